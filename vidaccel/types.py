"""The words of the house that need no torch: the token grid, the tile, and how attention is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import ConfigError, LayoutError

__all__ = ["KERNEL_PRECISIONS", "PRECISIONS", "SEEDS", "TRANSFORMERS", "Precision", "TileShape", "VideoGrid"]

#: The pipeline components a rule of a plan may name.
TRANSFORMERS = ("transformer", "transformer_2")

#: The least and the greatest seed that torch takes.
SEEDS = (-(2**63), 2**64 - 1)


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
        return self.frames * self.height * self.width  # torch.compile cannot trace math.prod of a size that changes


class VideoGrid(_Box):
    """The token grid of a video after patchify, for example 21x30x52 for 81 frames of 480x832 in Wan."""


class TileShape(_Box):
    """The extent of one 3D tile in tokens; tiles at the far edges of a grid may be smaller."""


Granularity = Literal["tensor", "block", "rows32", "channels16"]
QKFormat = Literal["native", "int8", "fp8", "int4", "nvfp4", "binary"]
PVFormat = Literal["native", "fp8", "int8", "nvfp4"]
ChannelScaling = Literal["none", "pairs", "channels"]

#: Largest finite float8_e4m3fn, the range that V fills unless a recipe wants less.
FP8_RANGE = 448.0


@dataclass(frozen=True)
class Precision:
    """How QK^T and PV are computed.

    Args:
        name: the recipe's name, as plans and reports write it.
        qk: number format of Q and K in QK^T. ``"native"`` is the dtype of the inputs; ``"nvfp4"`` is E2M1 in groups
            of 16 channels with an E4M3 scale each (SageAttention3); ``"binary"`` is sign(x) * mean|x|
            (BinaryAttention, for weights trained with it).
        pv: number format of P and V in PV. ``"int8"`` is P as unsigned 8 bits with the scale 1/255 and V in int8
            (BinaryAttention); ``"nvfp4"`` takes groups of 16 keys and scales each row of P in two levels.
        granularity: what shares one scale of Q and of K: the whole head (``"tensor"``), one block of the layout
            (``"block"``; on 3D tiles this is FPSAttention's tile scale), 32 consecutive rows (``"rows32"``), or 16
            channels of one row (``"channels16"``, which is nvfp4's and no other's).
        smooth_k: subtract K's mean over the sequence first (SageAttention; exact for softmax, the LSE is corrected).
        smooth_q: subtract each block's mean from Q and add the missing term to the scores (SageAttention2).
        smooth_v: subtract V's mean over the sequence and add it back to the output (SageAttention2).
        scale_channels: multiply the channels of Q and divide those of K by factors that even out their ranges; exact
            for the product (FireQ). One factor a channel (``"channels"``, FireQ's post-RoPE scaling), or one for each
            pair of neighbouring channels (``"pairs"``), which commutes with a rotary embedding that turns channels
            2i and 2i+1 together, as Wan, HunyuanVideo and CogVideoX have it, so it equals a scaling before RoPE.
        v_range: largest value of V in fp8. SageAttention2++ takes 2.25, so that the sums fit fp16 accumulators.

    Raises:
        ConfigError: for an unknown value, or options that do not go together.
    """

    name: str
    qk: QKFormat = "native"
    pv: PVFormat = "native"
    granularity: Granularity = "block"
    smooth_k: bool = False
    smooth_q: bool = False
    smooth_v: bool = False
    scale_channels: ChannelScaling = "none"
    v_range: float = FP8_RANGE

    def __post_init__(self) -> None:
        valid = {"qk": QKFormat, "pv": PVFormat, "granularity": Granularity, "scale_channels": ChannelScaling}
        for field, values in valid.items():
            found = getattr(self, field)
            if found not in get_args(values):
                raise ConfigError(f"Precision.{field} is {found!r}; valid are {', '.join(get_args(values))}")
        if self.qk == "native" and (self.smooth_k or self.smooth_q):
            raise ConfigError(f"precision {self.name!r} smooths Q or K but does not quantise them; set qk or drop it")
        if self.pv == "native" and self.smooth_v:
            raise ConfigError(f"precision {self.name!r} smooths V but does not quantise it; set pv='fp8' or drop it")
        if self.qk == "native" and self.pv != "native":
            raise ConfigError(f"precision {self.name!r} quantises PV but not QK^T; quantise QK^T as well")
        if (self.qk == "nvfp4") != (self.granularity == "channels16"):
            raise ConfigError(
                f"precision {self.name!r} has qk={self.qk!r} and granularity={self.granularity!r}; nvfp4 goes with"
                " channels16, and nothing else does"
            )
        if self.scale_channels != "none" and self.qk in ("native", "binary"):
            raise ConfigError(
                f"precision {self.name!r} scales channels, which changes nothing with qk={self.qk!r}; set"
                " scale_channels='none' or another qk"
            )
        if self.v_range != FP8_RANGE and (self.pv != "fp8" or not 0 < self.v_range < FP8_RANGE):
            raise ConfigError(
                f"precision {self.name!r} has v_range={self.v_range!r}; valid is 0 < v_range <= 448, less than 448"
                " with pv='fp8' only"
            )

    @property
    def quantised(self) -> bool:
        """Whether anything is computed in fewer bits than the inputs have."""
        return self.qk != "native" or self.pv != "native"

    @property
    def emulated(self) -> bool:
        """Whether no GPU kernel here computes it: it is rounded as published and multiplied in float32 or float64."""
        return (
            self.qk not in ("native", "int8", "fp8")
            or self.pv not in ("native", "fp8")
            or self.scale_channels != "none"
            or self.v_range != FP8_RANGE
        )


#: The named recipes. A plan refers to them by name.
PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("native"),
        Precision("int8", qk="int8", granularity="block", smooth_k=True),  # SageAttention
        Precision("int8-fp8", qk="int8", pv="fp8", granularity="rows32", smooth_k=True),  # SageAttention2
        Precision("fp8-tile", qk="fp8", pv="fp8", granularity="block"),  # FPSAttention, and its coarse and fine phases
        Precision("fp8-tensor", qk="fp8", pv="fp8", granularity="tensor"),
        Precision("fp8-rows32", qk="fp8", pv="fp8", granularity="rows32"),
        # from here on emulated
        Precision("int8-fp8-acc16", "int8", "fp8", "rows32", smooth_k=True, v_range=2.25),  # SageAttention2++
        Precision("int4-fp8", "int4", "fp8", "rows32", smooth_k=True, smooth_q=True),  # SageAttention2 with INT4
        Precision("int4-fp8-pairs", "int4", "fp8", "rows32", smooth_k=True, scale_channels="pairs"),  # FireQ's scalings
        Precision("int4-fp8-channels", "int4", "fp8", "rows32", smooth_k=True, scale_channels="channels"),
        Precision("nvfp4", "nvfp4", "nvfp4", "channels16", smooth_k=True, smooth_q=True),  # SageAttention3
        Precision("binary", "binary", "int8", "tensor"),  # BinaryAttention: poor without weights trained with it
    )
}

#: The recipes that GPU kernels here compute; the others are emulated.
KERNEL_PRECISIONS: dict[str, Precision] = {name: p for name, p in PRECISIONS.items() if not p.emulated}
