"""The floors of the house: a module imports from lower floors, or without a cycle from its own folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vidaccel

PACKAGE = Path(vidaccel.__file__).parent

#: First part of a module's name below vidaccel -> its floor. A new file in the package's root needs a floor here.
FLOORS = {
    "version": 0,
    "errors": 0,
    "types": 0,
    "files": 0,
    "device": 0,
    "discovery": 0,
    "layout": 1,
    "axisrule": 1,
    "blockmask": 1,
    "variablemask": 1,
    "pooling": 1,
    "configs": 1,
    "kernels": 2,
    "linear": 2,
    "patterns": 3,
    "compensation": 4,
    "engine": 5,
    "patchers": 6,
    "pipelines": 7,
    "calibration": 8,
    "quality": 8,
    "report": 8,
    "cli": 9,
    "__main__": 10,
    "__init__": 10,
}


def module_name(path: Path) -> str:
    """``configs.plan`` for vidaccel/configs/plan.py, ``configs`` for its __init__, ``__init__`` for the root's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts}


def imports(name: str, source: str, *, is_package: bool, typing: bool = True) -> set[str]:
    """Modules of vidaccel that a source imports, wherever in the file; ``typing``: also those for type checkers."""
    found = set()
    inside = ["vidaccel", *(() if name == "__init__" else name.split("."))]
    tree = ast.parse(source)
    if not typing:
        tree = _WithoutTyping().visit(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (is_package and node.level > 0)
            base = [] if not node.level else inside[: len(inside) - up]
            full = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # "from . import x" may mean the module x or a name in the package's __init__
            found |= {
                f"{full}.{alias.name}" if f"{full}.{alias.name}".removeprefix("vidaccel.") in MODULES else full
                for alias in node.names
            }
    ours = {module for module in found if module == "vidaccel" or module.startswith("vidaccel.")}
    return {module.removeprefix("vidaccel").removeprefix(".") or "__init__" for module in ours}


class _WithoutTyping(ast.NodeTransformer):
    """Takes out the blocks that never run."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def graph(*, typing: bool) -> dict[str, set[str]]:
    """What every module imports."""
    return {
        name: imports(name, path.read_text("utf-8"), is_package=path.name == "__init__.py", typing=typing)
        for name, path in MODULES.items()
    }


GRAPH = graph(typing=True)


def folder(name: str) -> str:
    """The folder on a floor that a module belongs to; files in the package's root share one."""
    first = name.split(".")[0]
    return first if (PACKAGE / first).is_dir() else ""


def test_imports_are_understood() -> None:
    source = (
        "import torch\nimport vidaccel.configs.plan\nfrom vidaccel import patch\nfrom ..types import VideoGrid\n"
        "from . import plan\nfrom .plan import Plan\ndef f():\n    from ..errors import ConfigError\n"
    )
    found = imports("configs.presets", source, is_package=False)
    assert found == {"configs.plan", "__init__", "types", "errors"}
    assert imports("configs", "from .plan import Plan", is_package=True) == {"configs.plan"}
    assert imports("__init__", "from .types import VideoGrid", is_package=True) == {"types"}
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import Plan\n"
    assert imports("configs.codec", typed, is_package=False) == {"configs.plan"}
    assert imports("configs.codec", typed, is_package=False, typing=False) == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_stands_on_lower_floors(name: str) -> None:
    first = name.split(".")[0]
    assert first in FLOORS, f"give vidaccel/{first} a floor in {Path(__file__).name} and in DESIGN.md"
    for target in GRAPH[name]:
        assert target in MODULES, f"{name} imports {target}, which does not exist"
        floor, below = FLOORS[first], FLOORS[target.split(".")[0]]
        beside = floor == below and folder(name) == folder(target)
        assert below < floor or beside, f"{name} (floor {floor}) imports {target} (floor {below})"


def test_no_cycles() -> None:
    """Two modules of a folder may name each other's types, but no import that runs goes round in a circle."""
    edges, done = graph(typing=False), set[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in edges[name] & edges.keys():
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_only_device_reads_environment_variables() -> None:
    readers = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        )
    }
    assert readers <= {"device"}


def test_triton_is_imported_by_its_own_folder_only() -> None:
    users = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "triton" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "triton")
    }
    assert all(name.startswith("kernels.triton") for name in users), users
