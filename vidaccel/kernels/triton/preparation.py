"""What the forward kernel reads, from q, k and v: 8-bit copies with their scales, and block means behind the keys.

Written in torch operations, so it runs on any device and is the specification of the fused kernels that replace it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...layout import TokenLayout
from ...types import Precision
from ..quantise import ROWS, Quantised, quantise, quantise_channels, row_groups
from ..tail import block_means
from .worklist import aligned_offsets

__all__ = ["MEANS_PER_SCALE", "Prepared", "append_means", "prepare"]

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


def append_means(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """``x`` [B,S,H,D] with its NB block means behind it, computed in float32 and rounded to x's dtype: [B,S+NB,H,D]."""
    return torch.cat([x, _means(x, layout).to(x.dtype)], dim=1)


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, precision: Precision, *, tail: bool
) -> Prepared:
    """Operands of a quantised precision from q, k, v [B,S,H,D] in layout order, with exactly the oracle's scales."""
    ready_q = _heads_first(q).float()
    ready_k = _heads_first(k).float()
    k_mean = ready_k.mean(-2) if precision.smooth_k else None
    if k_mean is not None:
        ready_k = ready_k - k_mean.unsqueeze(-2)
    assert precision.qk != "native"  # Precision says so of every quantised one
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
        values, v_scale, v_mean = _fp8_values(v, layout, precision, tail)
    elif tail:
        values = append_means(v, layout)
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


def _fp8_values(
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
    rows = {"tensor": count, "block": MEANS_PER_SCALE, "rows32": ROWS}[precision.granularity]
    return torch.arange(count) // rows


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B,H,S,D] as a contiguous [B,S,H,D]."""
    return x.transpose(1, 2).contiguous()


def _joined(first: Quantised, second: Quantised) -> Quantised:
    # float8 has no concatenation on every device; its bits have
    values = torch.cat([first.values.view(torch.uint8), second.values.view(torch.uint8)], dim=-2)
    return Quantised(values.view(first.values.dtype), torch.cat([first.scale, second.scale], dim=-2))
