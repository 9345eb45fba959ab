"""The forward kernel as it was: tiles of Q and of the output at ``[0, 0]`` of descriptors that begin with the piece.

Where warps are specialised, Triton moves both coordinates of the second consumer's tiles: half of the rows are garbage.
Every check that could see this is held against it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel.kernels.triton import forward

__all__ = ["moved_columns"]

_EDITS: Mapping[str, str] = {
    "(q + b * q_batch + h * q_head, [first + rows, D]": (
        "(q + b * q_batch + h * q_head + first.to(tl.int64) * q_row, [rows, D]"
    ),
    "q_tile.load([first, 0])": "q_tile.load([0, 0])",
    "out_base = out + b * out_batch + h * out_head\n": (
        "out_base = out + b * out_batch + h * out_head + first.to(tl.int64) * out_row\n"
    ),
    "(out_base, [first + rows, D]": "(out_base, [rows, D]",
    "out_tile.store([first, 0]": "out_tile.store([0, 0]",
}


def moved_columns(folder: Path) -> Any:
    """That kernel; its source is written to ``folder``, because Triton reads sources from files."""
    source = Path(forward.__file__).read_text(encoding="utf-8")
    for new, old in _EDITS.items():
        assert source.count(new) == 1, f"forward.py has {source.count(new)} of {new!r}"
        source = source.replace(new, old)
    path = folder / "moved_columns_forward.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{forward.__package__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.block_sparse_forward
