"""What a self-test computes: small calls that reach what kernels compile differently."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...types import TileShape
from ..contract import KernelRequest

__all__ = ["CASES", "Case", "cases_of"]


@dataclass(frozen=True)
class Case:
    """One call to check.

    Args:
        name: how a verdict calls it.
        grid: token grid (frames, height, width).
        tile: tile shape; edge tiles of uneven grids are ragged.
        densities: share of kept blocks, one for each head; 0 keeps the diagonal alone, a list of one piece.
        text: text tokens.
        batch: videos.
        head_dim: channels.
        dtype: of q, k, v.
        precision: name of a recipe.
        tail: whether the pooled tail is on.
    """

    name: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    densities: tuple[float, ...]
    text: int = 0
    batch: int = 1
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    precision: str = "native"
    tail: bool = False


_RAGGED: dict[str, Any] = {"grid": (5, 13, 11), "tile": (4, 6, 5), "text": 13}

#: Short, odd, long and uneven lists; blocks from 1 to 128 tokens; every variant that a kernel written by hand for one
#: architecture compiles differently.
CASES = (
    Case("bf16 ragged", **_RAGGED, batch=2, densities=(0.0, 0.4, 1.0)),
    Case("bf16 ragged tail", **_RAGGED, batch=2, densities=(0.0, 0.4, 1.0), tail=True),
    Case("bf16 uniform", (8, 16, 16), (4, 8, 4), (0.0, 0.5, 1.0)),
    Case("bf16 96 channels", **_RAGGED, densities=(0.1,), head_dim=96),
    Case("bf16 64 channels tail", **_RAGGED, densities=(0.1, 0.7), head_dim=64, tail=True),
    Case("fp16 uniform", (8, 8, 8), (4, 8, 4), (0.0, 1.0), dtype=torch.float16),
    Case("fp8 ragged", **_RAGGED, batch=2, densities=(0.0, 0.4, 1.0), precision="fp8-tile"),
    Case("fp8 uniform", (8, 16, 16), (4, 8, 4), (0.0, 1.0), precision="fp8-tile"),
    Case("fp8 ragged tail", **_RAGGED, densities=(0.0, 0.4), precision="fp8-tile", tail=True),
    Case("fp8 64 channels", **_RAGGED, densities=(0.3,), head_dim=64, precision="fp8-tile"),
)


def cases_of(request: KernelRequest, tile: TileShape) -> tuple[Case, ...]:
    """The hard case for a kernel that is about to serve such calls, and with a tail a second one with it.

    Two tiles in height and in width, of which the second is cut, and text; lists of one block, of some and of all.
    Small, because the oracle needs every score in float64.
    """
    height, width = (2 * size - 1 if size > 1 else 2 for size in (tile.height, tile.width))
    name = f"{request.precision.name}, {request.head_dim} channels"
    case = Case(
        name, (tile.frames, height, width), (tile.frames, tile.height, tile.width), (0.0, 0.5, 1.0), text=13,
        head_dim=request.head_dim, dtype=request.dtype, precision=request.precision.name,
    )  # fmt: skip
    return (case, replace(case, name=f"{name}, tail", tail=True)) if request.tail else (case,)
