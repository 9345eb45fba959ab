"""Builds the wheel and the sdist, installs each in a clean environment, and uses it there: ``make package``.

Takes some minutes and downloads every dependency, torch among them, so it is not part of ``make test``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle moving left on a striped background"


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command; ends this program if it fails. It sees nothing of the checkout."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=inherited, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def environment(folder: Path) -> Path:
    """A new environment; its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def build(scratch: Path) -> tuple[Path, Path]:
    """The wheel, made from the sdist, and the sdist."""
    python = environment(scratch / "build-env")
    run(python, "-m", "pip", "install", "--quiet", "build", cwd=scratch)
    run(python, "-m", "build", "--outdir", scratch / "dist", ROOT, cwd=scratch)
    (wheel,), (sdist,) = (sorted((scratch / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Every file of the package that git knows is in both, and nothing else of the checkout in the wheel."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "vidaccel"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    for what, found in (("wheel", in_wheel), ("sdist", in_sdist)):
        missing = sorted(wanted - found)
        if missing:
            sys.exit(f"the {what} lacks {', '.join(missing)}; see package-data in pyproject.toml")
    foreign = sorted(n for n in in_wheel if not n.startswith("vidaccel/") and ".dist-info/" not in n)
    if foreign:
        sys.exit(f"the wheel holds {', '.join(foreign)}, which is not the package")
    print(f"contents: {len(wanted)} files of the package are in both; wheel {wheel.stat().st_size / 1e6:.1f} MB")


def use(artifact: Path, scratch: Path, name: str, constraints: Path | None) -> None:
    """Installs ``artifact`` in an environment of its own and runs the commands there."""
    python = environment(scratch / name)
    pinned = ["-c", constraints] if constraints else []
    began = time.perf_counter()
    if constraints:  # without the pin pip may take a build of torch that is gigabytes larger
        run(python, "-m", "pip", "install", "--quiet", *pinned, "torch", cwd=scratch)
    run(python, "-m", "pip", "install", "--quiet", *pinned, artifact, cwd=scratch)
    print(f"{name}: installed in {time.perf_counter() - began:.0f} s")
    command = python.parent / "vidaccel"
    outside = scratch / f"{name}-outside"
    outside.mkdir()
    where = run(python, "-c", "import vidaccel; print(vidaccel.__file__)", cwd=outside).strip()
    if not Path(where).is_relative_to(scratch / name):
        sys.exit(f"{name}: vidaccel was imported from {where}, not from the environment")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run(command, "--help", cwd=outside)
        times.append(time.perf_counter() - began)
    print(f"{name}: vidaccel --help takes {min(times):.2f} s at best, {max(times):.2f} s at worst")
    run(command, "generate", PROMPT, "--plan", "sta", "-o", "clip.mp4", "--seed", "0", cwd=outside)
    told = json.loads((outside / "clip.json").read_text())
    if (outside / "clip.mp4").stat().st_size < 1000:
        sys.exit(f"{name}: clip.mp4 is empty")
    print(f"{name}: vidaccel generate wrote clip.mp4 by plan {told['plan']} with the model {told['model']}")


def main() -> None:
    """Builds and uses both."""
    parser = argparse.ArgumentParser(description="Build and use the packages.")
    parser.add_argument("--unpinned", action="store_true", help="take the newest dependencies, as a user would")
    parser.add_argument("--only", choices=["wheel", "sdist"], help="install only one of them")
    given = parser.parse_args()
    constraints = None if given.unpinned else ROOT / "constraints.txt"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        wheel, sdist = build(scratch)
        check_contents(wheel, sdist)
        for name, artifact in (("wheel", wheel), ("sdist", sdist)):
            if given.only in (None, name):
                use(artifact, scratch, name, constraints)
    print("packages work")


if __name__ == "__main__":
    main()
