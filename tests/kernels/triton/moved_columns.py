"""The forward kernel as it was: tiles of Q and of the output at ``[0, 0]`` of descriptors that begin with the piece.

Where warps are specialised, Triton moves both coordinates of the second consumer's tiles: half of the rows are garbage.
Every check that could see this is held against it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vidaccel.kernels.triton import forward

__all__ = ["moved_columns"]

#: Each branch for specialised warps is taken for all others' way.
_BRANCH, _NEVER, _BRANCHES = "    if WARP_SPECIALIZE:", "    if False:", 3


def moved_columns(folder: Path) -> Any:
    """That kernel; its source is written to ``folder``, because Triton reads sources from files."""
    source = Path(forward.__file__).read_text(encoding="utf-8")
    assert source.count(_BRANCH) == _BRANCHES, f"forward.py has {source.count(_BRANCH)} branches for specialised warps"
    source = source.replace(_BRANCH, _NEVER)
    path = folder / "moved_columns_forward.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{forward.__package__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.block_sparse_forward
