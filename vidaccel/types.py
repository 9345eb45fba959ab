"""The words of the house that need no torch: the token grid, the tile, and how attention is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError, LayoutError

__all__ = ["PRECISIONS", "Precision", "TileShape", "VideoGrid"]


@dataclass(frozen=True, order=True)
class _Box:
    """Three positive extents in (frames, height, width) order."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for axis, extent in zip(("frames", "height", "width"), self, strict=True):
            if not isinstance(extent, int) or isinstance(extent, bool) or extent < 1:
                raise LayoutError(f"{type(self).__name__}.{axis} is {extent!r}; give a whole number of at least 1")

    def __iter__(self) -> Iterator[int]:
        return iter((self.frames, self.height, self.width))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def tokens(self) -> int:
        """Tokens in the box: frames * height * width."""
        return math.prod(self)


class VideoGrid(_Box):
    """The token grid of a video after patchify, for example 21x30x52 for 81 frames of 480x832 in Wan."""


class TileShape(_Box):
    """The extent of one 3D tile in tokens; tiles at the far edges of a grid may be smaller."""


@dataclass(frozen=True)
class Precision:
    """How QK^T and PV are computed.

    Args:
        name: the recipe's name, as plans and reports write it.
        qk: number format of Q and K in QK^T; ``"native"`` is the dtype of the inputs.
        pv: number format of P and V in PV.
        granularity: what shares one scale of Q and of K: the whole head (``"tensor"``), one block of the layout
            (``"block"``; on 3D tiles this is FPSAttention's tile scale), or 32 consecutive rows (``"rows32"``).
        smooth_k: subtract K's mean over the sequence first (SageAttention; exact for softmax, the LSE is corrected).
        smooth_q: subtract each block's mean from Q and add the missing term to the scores (SageAttention2).
        smooth_v: subtract V's mean over the sequence and add it back to the output (SageAttention2).
    """

    name: str
    qk: Literal["native", "int8", "fp8"] = "native"
    pv: Literal["native", "fp8"] = "native"
    granularity: Literal["tensor", "block", "rows32"] = "block"
    smooth_k: bool = False
    smooth_q: bool = False
    smooth_v: bool = False

    def __post_init__(self) -> None:
        valid = {
            "qk": ("native", "int8", "fp8"),
            "pv": ("native", "fp8"),
            "granularity": ("tensor", "block", "rows32"),
        }
        for field, values in valid.items():
            if getattr(self, field) not in values:
                found = getattr(self, field)
                raise ConfigError(f"Precision.{field} is {found!r}; valid are {', '.join(values)}")
        if self.qk == "native" and (self.smooth_k or self.smooth_q):
            raise ConfigError(f"precision {self.name!r} smooths Q or K but does not quantise them; set qk or drop it")
        if self.pv == "native" and self.smooth_v:
            raise ConfigError(f"precision {self.name!r} smooths V but does not quantise it; set pv='fp8' or drop it")
        if self.qk == "native" and self.pv != "native":
            raise ConfigError(f"precision {self.name!r} quantises PV but not QK^T; quantise QK^T as well")

    @property
    def quantised(self) -> bool:
        """Whether anything is computed in fewer bits than the inputs have."""
        return self.qk != "native" or self.pv != "native"


#: The named recipes. A plan refers to them by name.
PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("native"),
        Precision("int8", qk="int8", granularity="block", smooth_k=True),  # SageAttention
        Precision("int8-fp8", qk="int8", pv="fp8", granularity="rows32", smooth_k=True),  # SageAttention2
        Precision("fp8-tile", qk="fp8", pv="fp8", granularity="block"),  # FPSAttention
    )
}
