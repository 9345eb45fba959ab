"""Scales and roundings of the 8-bit formats, exactly as the quantised kernels use them.

======  ==========================  ================================
format  scale                       rounding
======  ==========================  ================================
int8    max\\|x\\| / 127 + 1e-7       half away from zero
fp8     max\\|x\\| / 448              to nearest even (float8_e4m3fn)
======  ==========================  ================================

Scales are computed in float32, from float32 inputs, whatever the caller computes in: that is what a kernel does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..layout import TokenLayout
from ..types import Precision

__all__ = [
    "FP8_MAX",
    "INT8_MAX",
    "Quantised",
    "quantise",
    "quantise_channels",
    "quantise_weights",
    "round_queries_and_keys",
    "round_values",
    "row_groups",
]

INT8_MAX = 127.0
#: Largest finite float8_e4m3fn.
FP8_MAX = 448.0
#: Rows that share a scale under granularity "rows32".
ROWS = 32


@dataclass(frozen=True)
class Quantised:
    """A tensor in 8 bits with its scales.

    Args:
        values: int8 or float8_e4m3fn, the shape of the original.
        scale: float32, broadcasts to ``values``.
    """

    values: torch.Tensor
    scale: torch.Tensor

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """values * scale, computed in ``dtype``."""
        return self.values.to(torch.float32).to(dtype) * self.scale.to(dtype)


def row_groups(layout: TokenLayout, granularity: Literal["tensor", "block", "rows32"]) -> torch.Tensor:
    """Which rows of the sequence share a scale: the group of each token in layout order, int64 [S] on the CPU.

    The groups of 32 rows restart at each block, so that no group reaches over a block's end.
    """
    if granularity == "tensor":
        return torch.zeros(layout.tokens, dtype=torch.int64)
    blocks = torch.repeat_interleave(torch.arange(layout.num_blocks), layout.block_sizes)
    if granularity == "block":
        return blocks
    per_block = (layout.block_sizes + ROWS - 1) // ROWS
    first_group = per_block.cumsum(0) - per_block
    rank = torch.arange(layout.tokens) - layout.block_offsets[blocks]
    return first_group[blocks] + rank // ROWS


def quantise(x: torch.Tensor, groups: torch.Tensor, number_format: Literal["int8", "fp8"]) -> Quantised:
    """Quantises ``x`` [..., S, D] with one scale per group of rows.

    Args:
        groups: int64 [S], as :func:`row_groups` makes them.
    """
    x = x.float()
    groups = groups.to(x.device)
    row_max = x.abs().amax(-1)
    index = groups.expand_as(row_max)
    empty = row_max.new_zeros(*row_max.shape[:-1], int(groups.max()) + 1)
    largest = empty.scatter_reduce(-1, index, row_max, "amax").gather(-1, index).unsqueeze(-1)
    if number_format == "int8":
        scale = largest / INT8_MAX + 1e-7
        return Quantised(_round_half_away(x / scale).to(torch.int8), scale)
    return _to_fp8(x, largest)


def quantise_channels(v: torch.Tensor) -> Quantised:
    """Quantises ``v`` [..., S, D] to fp8 with one scale per channel."""
    v = v.float()
    return _to_fp8(v, v.abs().amax(-2, keepdim=True))


def round_queries_and_keys(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, precision: Precision
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the precision multiplies instead of q and k [..., S, D].

    Returns:
        q and k after smoothing and rounding, the means taken from q (of each row's block, [..., S, D]) and from k
        ([..., 1, D]); zeros where nothing was taken. ``q k^T`` is about
        ``(q' + q_mean)(k' + k_mean)^T``, of which ``q' k'^T`` is computed in 8 bits.
    """
    if precision.qk == "native":
        return q, k, torch.zeros_like(q), torch.zeros_like(k[..., :1, :])
    dtype = q.dtype
    q, k = q.float(), k.float()  # kernels smooth and round from float32
    q_mean, k_mean = torch.zeros_like(q), torch.zeros_like(k[..., :1, :])
    if precision.smooth_k:
        k_mean = k.mean(-2, keepdim=True)
    if precision.smooth_q:
        parts = q.split(layout.block_sizes.tolist(), dim=-2)
        q_mean = torch.cat([part.mean(-2, keepdim=True).expand_as(part) for part in parts], dim=-2)
    groups = row_groups(layout, precision.granularity)
    q_rounded, k_rounded = (
        quantise(x - mean, groups, precision.qk).dequantise(dtype) for x, mean in ((q, q_mean), (k, k_mean))
    )
    return q_rounded, k_rounded, q_mean.to(dtype), k_mean.to(dtype)


def round_values(v: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """V [..., S, D] after smoothing and rounding, and the mean taken from it [..., 1, D] (zeros if none was)."""
    none = torch.zeros_like(v[..., :1, :])
    if precision.pv == "native":
        return v, none
    rest = v.float()
    mean = rest.mean(-2, keepdim=True) if precision.smooth_v else none.float()
    return quantise_channels(rest - mean).dequantise(v.dtype), mean.to(v.dtype)


def quantise_weights(p: torch.Tensor) -> Quantised:
    """Quantises softmax weights in [0, 1] to fp8 with the fixed scale 1/448."""
    return _to_fp8(p.float(), torch.ones((), device=p.device))


def _to_fp8(x: torch.Tensor, largest: torch.Tensor) -> Quantised:
    scale = largest / FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros stays zeros
    return Quantised((x / scale).to(torch.float8_e4m3fn), scale)


def _round_half_away(x: torch.Tensor) -> torch.Tensor:
    return torch.sign(x) * torch.floor(x.abs() + 0.5)
