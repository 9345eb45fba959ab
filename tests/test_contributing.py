"""docs/CONTRIBUTING.md followed in a copy of the tree, to the end: its files and one line, and nothing else edited."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: Path and content of every example that begins with its path.
FILES = dict(re.findall(r"```(?:python|yaml)\n# ((?:vidaccel|tests)/[\w/]+\.\w+)\n(.*?)```", TEXT, re.S))
#: The line of a precision.
LINE = re.findall(r"```python\n# vidaccel/types\.py, in PRECISIONS\n(.*?)```", TEXT, re.S)
#: What asks the registries for all there is.
GENERIC = [
    "tests/test_own_files.py",
    "tests/test_floors.py",
    "tests/configs/test_published.py",
    "tests/configs/test_presets.py::test_names",
    "tests/patterns/test_formulas.py::test_every_static_pattern_has_a_formula",
    "tests/calibration/test_candidates.py::test_the_set_of_systems_has_every_training_free_one",
    "tests/patchers/test_base.py",
    "tests/test_types.py",
    "tests/kernels/test_dispatch.py",
    "tests/cli/test_models.py",
    "tests/patterns/test_patterns.py",
    "tests/pipelines/test_frame_rate.py",
]
#: Tests with a case for each item; the new one's is enough, and one of a family that was there before.
EACH = [
    "tests/report/test_plans.py",
    "tests/reliability/test_parallel.py",
    "tests/configs/test_system_presets.py",
    "tests/kernels/test_few_bits.py",
    "tests/patchers/test_places.py",
]
NEW = "[rows] or plain or is_written_out or MochiPipeline"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with the examples in it."""
    root = tmp_path_factory.mktemp("followed")
    for folder in ("vidaccel", "tests", "benchmarks", "examples", "docs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / name)
    for name, code in FILES.items():
        assert not (root / name).exists(), f"the example {name} is a file that there is; give it another name"
        (root / name).write_text(code, encoding="utf-8")
    types = root / "vidaccel" / "types.py"
    above, mark, below = types.read_text(encoding="utf-8").partition("        # from here on emulated\n")
    types.write_text(above + mark + "".join(LINE) + below, encoding="utf-8")
    page = run(root, "-m", "vidaccel", "models", "--markdown")
    (root / "docs" / "MODELS.md").write_text(page, encoding="utf-8")
    return root


def run(root: Path, *words: str) -> str:
    """What Python prints, with the copy's package and not this one's."""
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run([sys.executable, *words], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_there_is_an_example_and_a_test_of_each_kind() -> None:
    kinds = {name.rpartition("/")[0] for name in FILES}
    shipped = {f"vidaccel/{kind}" for kind in ("patterns", "compensation", "patchers", "configs/presets")}
    tests = {f"tests/{kind}" for kind in ("patterns", "compensation", "patchers", "configs/published", "kernels")}
    assert kinds == shipped | tests and len(LINE) == 1


@pytest.mark.slow
def test_the_examples_pass_lint(copy: Path) -> None:
    code = [name for name in FILES if name.endswith(".py")] + ["vidaccel/types.py"]
    run(copy, "-m", "ruff", "check", "--no-cache", *code)
    run(copy, "-m", "ruff", "format", "--no-cache", "--check", *code)
    run(copy, "-m", "mypy", *(name for name in code if name.startswith("vidaccel/")))


@pytest.mark.slow
def test_the_copy_is_what_is_tested(copy: Path) -> None:
    said = run(copy, "-c", "import vidaccel, vidaccel.patterns as p; print(vidaccel.__file__, *p.pattern_names())")
    assert said.startswith(str(copy)) and "same_row" in said and "nearest" in said


@pytest.mark.slow
def test_own_and_generic_tests_pass_with_nothing_else_edited(copy: Path) -> None:
    own = [name for name in FILES if re.fullmatch(r"tests/.*/test_\w+\.py", name)]
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own, *GENERIC)
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *EACH, "-k", NEW)
