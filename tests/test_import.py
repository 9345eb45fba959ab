"""What importing vidaccel costs and needs, each in a fresh process, and the public names."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vidaccel

pytestmark = pytest.mark.full

ROOT = Path(vidaccel.__file__).parents[1]


def run_fresh(code: str) -> str:
    """Runs code in a new interpreter and returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy() -> None:
    loaded = run_fresh(
        "import sys, vidaccel; dir(vidaccel); vidaccel.__version__;"
        "print(*[m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'triton', 'yaml') if m in sys.modules])"
    )
    assert loaded == ""


def test_works_without_triton_and_leaves_cuda_alone() -> None:
    """Every public name, and every module of the package, comes without Triton and starts no CUDA context."""
    code = """
import importlib, pkgutil, sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import vidaccel
for name in vidaccel.__all__:
    getattr(vidaccel, name)
for module in pkgutil.walk_packages(vidaccel.__path__, "vidaccel."):
    if not module.name.startswith("vidaccel.kernels.triton."):
        importlib.import_module(module.name)
import torch
print(torch.cuda.is_initialized(), "triton" in sys.modules)
"""
    assert run_fresh(code).splitlines()[-1] == "False False"


def test_all_is_what_there_is() -> None:
    """``__all__``, the lazy table and the block for type checkers name the same things."""
    assert vidaccel.__all__ == sorted(set(vidaccel.__all__), key=vidaccel.__all__.index)
    assert set(vidaccel.__all__) == {"__version__", *vidaccel._LAZY}
    tree = ast.parse(Path(vidaccel.__file__).read_text(encoding="utf-8"))
    checked = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert checked == set(vidaccel._LAZY)


@pytest.mark.parametrize("name", vidaccel.__all__)
def test_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(vidaccel, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        assert value.__module__.startswith("vidaccel.")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pacth'"):
        vidaccel.pacth  # noqa: B018
    assert set(vidaccel.__all__) <= set(dir(vidaccel))
