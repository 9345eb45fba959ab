"""What the forward kernel reads, from q, k and v: 8-bit copies with their scales, and block means behind the keys.

:func:`prepare` and :func:`append_means` run kernels: one pass over each of q, k and v, and before it one that reads
where a mean or a scale of the whole sequence must come first. :func:`prepare_in_torch` and :func:`append_in_torch` say
the same in torch operations, on any device: the specification that tests hold the kernels to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...errors import KernelError
from ...layout import TokenLayout
from ...pooling import block_means
from ...types import Precision
from ..quantise import FP8_MAX, ROWS, Quantised, quantise, quantise_channels, row_groups
from .means import BlockRanges, block_offsets, block_ranges, sequence_mean
from .means import append_means as write_with_means
from .quantise import round_rows, round_values
from .worklist import aligned_offsets

__all__ = [
    "MEANS_PER_SCALE",
    "Prepared",
    "append_in_torch",
    "append_means",
    "prepare",
    "prepare_in_torch",
    "room",
]

#: Block means that share one scale of K under granularity "block".
MEANS_PER_SCALE = 128


@dataclass(frozen=True, eq=False)
class Prepared:
    """The kernel's operands. S' is S, or S + NB where NB block means follow the keys.

    Args:
        q: [B,S,H,D] in the inputs' dtype, int8 or float8_e4m3fn.
        k: [B,S',H,D] in the same format.
        v: [B,S',H,D] in the inputs' dtype; or, for fp8 PV, transposed [B,H,D,columns] float8_e4m3fn with blocks at
            :func:`.worklist.aligned_offsets` and zeros between them, because the tensor cores want keys contiguous.
        q_scale: float32 [B,H,S], one per row; rows of a group hold the same value. ``None`` for native.
        k_scale: float32 [B,H,S'].
        v_scale: float32 [B,H,D], for fp8 PV.
        k_mean: float32 [B,H,D], what K smoothing took away.
        v_mean: float32 [B,H,D], what V smoothing took away.
        bias: float32 [B,H,NB,S'], what Q smoothing took from the products of each query block: q_mean . k.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    k_mean: torch.Tensor | None = None
    v_mean: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, precision: Precision, *, tail: bool
) -> Prepared:
    """Operands of a quantised precision from q, k, v [B,S,H,D] in layout order, with exactly the oracle's scales.

    Raises:
        KernelError: if no kernel computes the precision.
    """
    if precision.emulated:
        raise KernelError(f"no kernel computes precision {precision.name!r}; use kernel 'emulated' or 'reference'")
    q_mean = k_mean = bias = v_scale = v_mean = None
    whole_head = precision.granularity == "tensor"
    q_ranges = block_ranges(q, layout) if precision.smooth_q or whole_head else None
    if precision.smooth_q and q_ranges is not None:
        q_mean = q_ranges.mean
    k_ranges = block_ranges(k, layout) if precision.smooth_k or whole_head else None
    if precision.smooth_k and k_ranges is not None:
        k_mean = sequence_mean(k_ranges.mean, layout).unsqueeze(-2)
    q8, q_scale, _ = _rounded(q, layout, precision, q_mean, q_ranges, tail=False)
    k8, k_scale, k_block_mean = _rounded(k, layout, precision, k_mean, k_ranges, tail=tail)
    if q_mean is not None:
        bias = _lost_products(q_mean, k, k_mean, k_block_mean)
    values: torch.Tensor = v
    if precision.pv == "fp8":
        values, v_scale, v_mean = _fp8_values(v, layout, precision, tail)
    elif tail:
        values = append_means(v, layout)
    k_mean = None if k_mean is None else k_mean.squeeze(-2)
    return Prepared(q8, k8, values, q_scale, k_scale, v_scale, k_mean, v_mean, bias)


def append_means(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """``x`` [B,S,H,D] with its NB block means behind it, computed in float32 and rounded to x's dtype: [B,S+NB,H,D]."""
    batch, tokens, heads, channels = x.shape
    return write_with_means(x, layout, room((batch, tokens + layout.num_blocks, heads, channels), x.dtype, x.device))


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor that a descriptor can address: rows of channels start at multiples of 16 bytes."""
    *rows, channels = shape
    step = 16 // dtype.itemsize
    return torch.empty(*rows, channels + -channels % step, dtype=dtype, device=device)[..., :channels]


def _rounded(
    x: torch.Tensor,
    layout: TokenLayout,
    precision: Precision,
    mean: torch.Tensor | None,
    ranges: BlockRanges | None,
    *,
    tail: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q or k in 8 bits, their scales, and the block means behind them if ``tail``, which are returned in float32 too.

    Args:
        mean: what smoothing takes away, float32 [B,H,1,D] or [B,H,NB,D].
        ranges: of x, for granularity "tensor".
    """
    batch, tokens, heads, channels = x.shape
    rows = tokens + (layout.num_blocks if tail else 0)
    dtype = torch.int8 if precision.qk == "int8" else torch.float8_e4m3fn
    out = room((batch, rows, heads, channels), dtype, x.device)
    scale = torch.empty(batch, heads, rows, dtype=torch.float32, device=x.device)
    largest = means = None
    if precision.granularity == "tensor" and ranges is not None:
        centre = torch.zeros((), device=x.device) if mean is None else mean
        largest = ranges.largest_around(centre).amax((-2, -1))
    if tail:
        means = torch.empty(batch, heads, layout.num_blocks, channels, dtype=torch.float32, device=x.device)
    offsets = block_offsets(layout, x.device)
    round_rows(
        *(x, offsets, out[:, :tokens], scale[..., :tokens], precision.granularity),
        mean=mean,
        largest=largest,
        block_mean=means,
    )
    if means is not None:
        # one scale for as many means as the precision wants: groups of means are like blocks of tokens
        groups = _mean_offsets(layout.num_blocks, _means_per_scale(layout.num_blocks, precision), x.device)
        round_rows(means.transpose(1, 2), groups, out[:, tokens:], scale[..., tokens:], "block")
    return out, scale, means


def _lost_products(
    q_mean: torch.Tensor, k: torch.Tensor, k_mean: torch.Tensor | None, k_block_mean: torch.Tensor | None
) -> torch.Tensor:
    """q_mean . (k - k_mean), float32 [B,H,NB,S']."""
    keys = _heads_first(k).float()
    if k_mean is not None:
        keys = keys - k_mean
    if k_block_mean is not None:
        keys = torch.cat([keys, k_block_mean], dim=-2)
    return q_mean @ keys.mT


def _fp8_values(
    v: torch.Tensor, layout: TokenLayout, precision: Precision, tail: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """V transposed in fp8 [B,H,D,columns], its scale and its mean over the sequence [B,H,D]."""
    batch, _, heads, channels = v.shape
    ranges = block_ranges(v, layout)
    mean = sequence_mean(ranges.mean, layout) if precision.smooth_v else None
    centre = torch.zeros((), device=v.device) if mean is None else mean.unsqueeze(-2)
    scale = ranges.largest_around(centre).amax(-2) / FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)  # a channel of zeros stays zeros
    first, columns = aligned_offsets(layout)[-2:].tolist()
    out = torch.empty(batch, heads, channels, columns, dtype=torch.float8_e4m3fn, device=v.device)
    round_values(v, layout, scale, mean, out)
    behind = torch.zeros(batch, heads, channels, columns - first, dtype=torch.float32, device=v.device)
    if tail:
        # a mean is never larger than the largest value, so the tokens' scale serves
        behind[..., : layout.num_blocks] = ((ranges.mean - centre) / scale.unsqueeze(-2)).mT
    out.view(torch.uint8)[..., first:] = behind.to(torch.float8_e4m3fn).view(torch.uint8)
    return out, scale, mean


@lru_cache(maxsize=64)
def _mean_offsets(count: int, step: int, device: torch.device) -> torch.Tensor:
    """Where each group of block means begins and, last, their number: int32."""
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        return torch.tensor([*range(0, count, step), count], dtype=torch.int32, device=device)


def _means_per_scale(count: int, precision: Precision) -> int:
    return {"tensor": count, "block": MEANS_PER_SCALE, "rows32": ROWS}[precision.granularity]


# -- the specification ------------------------------------------------------------------------------------------------


def append_in_torch(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The specification of :func:`append_means`."""
    return torch.cat([x, _means(x, layout).to(x.dtype)], dim=1)


def prepare_in_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, precision: Precision, *, tail: bool
) -> Prepared:
    """The specification of :func:`prepare`."""
    ready_q = _heads_first(q).float()
    ready_k = _heads_first(k).float()
    k_mean = ready_k.mean(-2) if precision.smooth_k else None
    if k_mean is not None:
        ready_k = ready_k - k_mean.unsqueeze(-2)
    assert precision.qk == "int8" or precision.qk == "fp8"
    groups = row_groups(layout, precision.granularity)
    q_means = _heads_first(_means(q, layout)) if precision.smooth_q else None
    if q_means is not None:
        ready_q = ready_q - q_means[..., layout.block_of_token.to(q.device), :]
    q8 = quantise(ready_q, groups, precision.qk)
    k8 = quantise(ready_k, groups, precision.qk)
    if tail:
        means = _heads_first(_means(ready_k.transpose(1, 2), layout))
        ready_k = torch.cat([ready_k, means], dim=-2)
        k8 = _joined(k8, quantise(means, _mean_groups(layout.num_blocks, precision), precision.qk))
    values: torch.Tensor = v
    v_scale = v_mean = None
    if precision.pv == "fp8":
        values, v_scale, v_mean = _fp8_values_in_torch(v, layout, precision, tail)
    elif tail:
        values = append_in_torch(v, layout)
    return Prepared(
        q=_rows(q8.values),
        k=_rows(k8.values),
        v=values,
        q_scale=q8.scale.squeeze(-1).contiguous(),
        k_scale=k8.scale.squeeze(-1).contiguous(),
        v_scale=v_scale,
        k_mean=k_mean,
        v_mean=v_mean,
        bias=None if q_means is None else q_means @ ready_k.mT,
    )


def _fp8_values_in_torch(
    v: torch.Tensor, layout: TokenLayout, precision: Precision, tail: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """V transposed in fp8 [B,H,D,columns], its scale and its mean over the sequence [B,H,D]."""
    rows = _heads_first(v).float()
    mean = rows.mean(-2) if precision.smooth_v else None
    if mean is not None:
        rows = rows - mean.unsqueeze(-2)
    values = quantise_channels(rows)
    offsets = aligned_offsets(layout).to(v.device)
    block = layout.block_of_token.to(v.device)
    token = torch.arange(layout.tokens, device=v.device)
    column = offsets[block] + token - layout.block_offsets.to(v.device)[block]
    room = torch.zeros(*values.values.shape[:2], v.shape[-1], int(offsets[-1]), dtype=torch.uint8, device=v.device)
    room[..., column] = values.values.mT.view(torch.uint8)
    if tail:
        # a mean is never larger than the largest value, so the tokens' scale serves
        means = _heads_first(_means(rows.transpose(1, 2), layout)) / values.scale
        first = int(offsets[-2])
        room[..., first : first + layout.num_blocks] = means.to(torch.float8_e4m3fn).mT.view(torch.uint8)
    return room.view(torch.float8_e4m3fn), values.scale.squeeze(-2).contiguous(), mean


def _means(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Block means of x [B,S,H,D]: float32 [B,NB,H,D]."""
    batch, _, heads, _ = x.shape
    means = block_means(_heads_first(x).flatten(0, 1), layout)
    return means.unflatten(0, (batch, heads)).transpose(1, 2)


def _mean_groups(count: int, precision: Precision) -> torch.Tensor:
    """Which block means share a scale: int64 [NB]."""
    return torch.arange(count) // _means_per_scale(count, precision)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B,H,S,D] as a contiguous [B,S,H,D]."""
    return x.transpose(1, 2).contiguous()


def _joined(first: Quantised, second: Quantised) -> Quantised:
    # float8 has no concatenation on every device; its bits have
    values = torch.cat([first.values.view(torch.uint8), second.values.view(torch.uint8)], dim=-2)
    return Quantised(values.view(first.values.dtype), torch.cat([first.scale, second.scale], dim=-2))
