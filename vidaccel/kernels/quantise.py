"""Scales and roundings of all formats, exactly as the quantised kernels use them, or as published where none exists.

======  ==========================  ================================
format  scale                       rounding
======  ==========================  ================================
int8    max\\|x\\| / 127 + 1e-7       half away from zero
int4    max\\|x\\| / 7 + 1e-7         half away from zero
fp8     max\\|x\\| / 448              to nearest even (float8_e4m3fn)
binary  mean\\|x\\|                   to the sign; zero counts as positive
nvfp4   max\\|x\\| / 6, in E4M3         to E2M1 (:mod:`.microscaling`)
======  ==========================  ================================

Scales are computed in float32, from float32 inputs, whatever the caller computes in: that is what a kernel does.

What is not imitated is the accumulation. SageAttention2++ adds PV in fp16, in an order that is not documented; one such
addition is off by at most 2^-11, and the rounding of V by up to 2^-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import KernelError
from ..layout import TokenLayout
from ..types import FP8_RANGE, Granularity, Precision
from .channels import scale_channels
from .microscaling import round_nvfp4, round_rows_in_two_levels

__all__ = [
    "FP8_MAX",
    "INT8_MAX",
    "Quantised",
    "quantise",
    "quantise_channels",
    "quantise_weights",
    "round_queries_and_keys",
    "round_values",
    "round_weights",
    "row_groups",
]

INT8_MAX = 127.0
INT4_MAX = 7.0
#: Weights are never negative, so BinaryAttention gives them all 8 bits.
UINT8_MAX = 255.0
#: Largest finite float8_e4m3fn.
FP8_MAX = FP8_RANGE
#: Rows that share a scale under granularity "rows32".
ROWS = 32


@dataclass(frozen=True)
class Quantised:
    """A tensor in 8 bits or fewer with its scales.

    Args:
        values: int8 (which also holds 4 bits and signs), uint8 or float8_e4m3fn, the shape of the original.
        scale: float32, broadcasts to ``values``.
    """

    values: torch.Tensor
    scale: torch.Tensor

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """values * scale, computed in ``dtype``."""
        return self.values.to(torch.float32).to(dtype) * self.scale.to(dtype)


def row_groups(layout: TokenLayout, granularity: Granularity) -> torch.Tensor:
    """Which rows of the sequence share a scale: the group of each token in layout order, int64 [S] on the CPU.

    The groups of 32 rows restart at each block, so that no group reaches over a block's end.

    Raises:
        KernelError: for "channels16", whose groups are not made of rows.
    """
    if granularity == "channels16":
        raise KernelError("granularity 'channels16' groups channels, not rows; valid are tensor, block and rows32")
    if granularity == "tensor":
        return torch.zeros(layout.tokens, dtype=torch.int64)
    blocks = torch.repeat_interleave(torch.arange(layout.num_blocks), layout.block_sizes)
    if granularity == "block":
        return blocks
    per_block = (layout.block_sizes + ROWS - 1) // ROWS
    first_group = per_block.cumsum(0) - per_block
    rank = torch.arange(layout.tokens) - layout.block_offsets[blocks]
    return first_group[blocks] + rank // ROWS


def quantise(
    x: torch.Tensor, groups: torch.Tensor, number_format: Literal["int8", "int4", "fp8", "binary"]
) -> Quantised:
    """Quantises ``x`` [..., S, D] with one scale per group of rows.

    Args:
        groups: int64 [S], as :func:`row_groups` makes them.
    """
    x = x.float()
    groups = groups.to(x.device)
    if number_format == "binary":
        row_mean = x.abs().mean(-1)
        index = groups.expand_as(row_mean)
        mean = _empty_groups(row_mean, groups).scatter_reduce(-1, index, row_mean, "mean", include_self=False)
        return Quantised(torch.where(x < 0, -1, 1).to(torch.int8), mean.gather(-1, index).unsqueeze(-1))
    row_max = x.abs().amax(-1)
    index = groups.expand_as(row_max)
    largest = _empty_groups(row_max, groups).scatter_reduce(-1, index, row_max, "amax").gather(-1, index).unsqueeze(-1)
    if number_format == "fp8":
        return _to_fp8(x, largest)
    return _to_int(x, largest, INT8_MAX if number_format == "int8" else INT4_MAX)


def quantise_channels(
    v: torch.Tensor, number_format: Literal["fp8", "int8"] = "fp8", largest: float = FP8_MAX
) -> Quantised:
    """Quantises ``v`` [..., S, D] with one scale per channel.

    Args:
        largest: what each channel's largest value becomes in fp8.
    """
    v = v.float()
    found = v.abs().amax(-2, keepdim=True)
    return _to_int(v, found, INT8_MAX) if number_format == "int8" else _to_fp8(v, found, largest)


def round_queries_and_keys(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, precision: Precision
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the precision multiplies instead of q and k [..., S, D].

    Returns:
        q and k after smoothing, scaling of channels and rounding, the means taken from q (of each row's block,
        [..., S, D]) and from k ([..., 1, D]); zeros where nothing was taken. The scores of the precision, without
        what is the same for all keys, are ``q' k'^T + q_mean (k - k_mean)^T``: the first product in few bits, the
        second in the kernel's own arithmetic.

    Raises:
        KernelError: if channels cannot be scaled by pairs, because their number is odd.
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
    rest_q, rest_k = scale_channels(q - q_mean, k - k_mean, precision.scale_channels)
    if precision.qk == "nvfp4":
        q_rounded, k_rounded = (round_nvfp4(x).to(dtype) for x in (rest_q, rest_k))
    else:
        groups = row_groups(layout, precision.granularity)
        q_rounded, k_rounded = (quantise(x, groups, precision.qk).dequantise(dtype) for x in (rest_q, rest_k))
    return q_rounded, k_rounded, q_mean.to(dtype), k_mean.to(dtype)


def round_values(v: torch.Tensor, layout: TokenLayout, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """V [..., S, D] after smoothing and rounding, and the mean taken from it [..., 1, D] (zeros if none was)."""
    none = torch.zeros_like(v[..., :1, :])
    if precision.pv == "native":
        return v, none
    rest = v.float()
    mean = rest.mean(-2, keepdim=True) if precision.smooth_v else none.float()
    rest = rest - mean
    if precision.pv == "nvfp4":
        # 16 keys of a channel share a scale; groups end with their block, as those of P do
        parts = [round_nvfp4(part.mT).mT for part in rest.split(layout.block_sizes.tolist(), dim=-2)]
        return torch.cat(parts, dim=-2).to(v.dtype), mean.to(v.dtype)
    return quantise_channels(rest, precision.pv, precision.v_range).dequantise(v.dtype), mean.to(v.dtype)


def quantise_weights(p: torch.Tensor, number_format: Literal["fp8", "int8"] = "fp8") -> Quantised:
    """Quantises softmax weights in [0, 1]: to fp8 with the fixed scale 1/448, or to unsigned 8 bits with 1/255."""
    if number_format == "int8":
        scale = torch.tensor(1 / UINT8_MAX, device=p.device)
        return Quantised(_round_half_away(p.float() * UINT8_MAX).to(torch.uint8), scale)
    return _to_fp8(p.float(), torch.ones((), device=p.device))


def round_weights(p: torch.Tensor, precision: Precision, sizes: Sequence[int]) -> torch.Tensor:
    """Softmax weights as the precision multiplies them with V, in their own dtype.

    Args:
        p: [..., N] in [0, 1], relative to the row's maximum.
        sizes: tokens of each key block, in order; they sum to N. Only nvfp4 looks at them.
    """
    if precision.pv == "native":
        return p
    if precision.pv != "nvfp4":
        return quantise_weights(p, precision.pv).dequantise(p.dtype)
    if len(set(sizes)) == 1:
        return round_rows_in_two_levels(p.unflatten(-1, (-1, sizes[0]))).flatten(-2).to(p.dtype)
    return torch.cat([round_rows_in_two_levels(part) for part in p.split(list(sizes), dim=-1)], dim=-1).to(p.dtype)


def _empty_groups(rows: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return rows.new_zeros(*rows.shape[:-1], int(groups.max()) + 1)


def _to_int(x: torch.Tensor, largest: torch.Tensor, most: float) -> Quantised:
    scale = largest / most + 1e-7
    return Quantised(_round_half_away(x / scale).to(torch.int8), scale)


def _to_fp8(x: torch.Tensor, largest: torch.Tensor, most: float = FP8_MAX) -> Quantised:
    scale = largest / most
    scale = torch.where(scale == 0, 1.0, scale)  # a group of zeros stays zeros
    return Quantised((x / scale).to(torch.float8_e4m3fn), scale)


def _round_half_away(x: torch.Tensor) -> torch.Tensor:
    return torch.sign(x) * torch.floor(x.abs() + 0.5)
