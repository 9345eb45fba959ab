"""What the package promises before it is installed; ``make package`` installs it."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "triton", "matplotlib", "cv2", "imageio")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["generate", "--help"], ["--version"], ["inspect", "--nonsense"]]
)
def test_the_command_line_speaks_without_heavy_imports(arguments: list[str]) -> None:
    """Importing torch and diffusers takes seconds, so help, versions and usage errors come before it."""
    code = f"""
import sys
import vidaccel.cli.main as cli
sys.argv = ["vidaccel", *{arguments!r}]
try:
    if sys.argv[1:]:
        cli.main()
except SystemExit as end:
    assert end.code in (0, 2, None), end.code
print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_every_file_of_the_package_is_shipped() -> None:
    """A template or preset that package-data forgets is there in a checkout and missing after an installation."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = told["tool"]["setuptools"]["package-data"]["vidaccel"]
    package = ROOT / "vidaccel"
    files = [
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    data = [name for name in files if not name.endswith((".py", ".pyc")) and ".partial" not in name]
    assert len(data) > 20
    forgotten = [n for n in data if not any(fnmatch.fnmatch(n, p.replace("**/*", "*")) for p in patterns)]
    assert not forgotten
    # without __init__.py find leaves a folder out
    folders = {path.parent for path in package.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
