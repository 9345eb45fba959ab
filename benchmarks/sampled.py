"""The float64 oracle for some rows of a sequence too long for the whole of it.

The same definition as :mod:`vidaccel.kernels.reference`, for the named precisions: roundings use the scales of the
whole sequence, and only then rows are picked. Tests hold it to that oracle where both fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.kernels.quantise import quantise, quantise_channels, quantise_weights, row_groups
from vidaccel.layout import TokenLayout
from vidaccel.pooling import block_means
from vidaccel.types import PRECISIONS, Precision

__all__ = ["Sample", "sampled_attention", "tolerance"]


@dataclass(frozen=True)
class Sample:
    """Which rows of which heads are checked; made by :meth:`of`.

    Args:
        rows: int64 [R] positions in the sequence.
        heads: heads, of batch entry 0.
    """

    rows: torch.Tensor
    heads: tuple[int, ...]

    @staticmethod
    def of(tokens: int, heads: int, count: int = 256, seed: int = 0) -> Sample:
        """``count`` random rows, the first and the last among them, of the first and the last head."""
        chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[: max(0, count - 2)]
        rows = torch.cat([chosen, torch.tensor([0, tokens - 1])]).unique()
        return Sample(rows, tuple(sorted({0, heads - 1})))

    def of_output(self, out: torch.Tensor) -> torch.Tensor:
        """The sample's rows of an output [B,S,H,D]: float64 [heads, R, D]."""
        return torch.stack([out[0, self.rows.to(out.device), head].double() for head in self.heads])


def sampled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    sample: Sample,
    *,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
) -> torch.Tensor:
    """Attention of the sample's rows in float64: [heads, R, D].

    Args:
        q, k, v: [B,S,H,D] in layout order; batch entry 0 is read.

    Raises:
        ValueError: for a precision that smooths Q or V, or that no kernel computes.
    """
    if precision.smooth_q or precision.smooth_v or precision.emulated:
        raise ValueError(
            f"precision {precision.name!r} smooths Q or V or is emulated; the sampled oracle knows the kernels' named"
            " recipes only"
        )
    parts = []
    for head in sample.heads:
        q_head, k_head, v_head = (x[0, :, head] for x in (q, k, v))
        parts.append(_one_head(q_head, k_head, v_head, layout, mask, head, sample, precision, tail))
    return torch.stack(parts)


def _one_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    head: int,
    sample: Sample,
    precision: Precision,
    tail: bool,
) -> torch.Tensor:
    rows = sample.rows.to(q.device)
    block = layout.block_of_token.to(q.device)
    kept = mask.dense[0, head if mask.shape[1] > 1 else 0].to(q.device)[block[rows]]  # [R, NB]
    scale = 1 / math.sqrt(q.shape[-1])
    q_rows, keys, values = q[rows].double(), k.double(), v.double()
    shift = torch.zeros(len(rows), 1, dtype=torch.float64, device=q.device)
    if precision.qk == "int8" or precision.qk == "fp8":
        groups = row_groups(layout, precision.granularity)
        mean = k.float().mean(0, keepdim=True) if precision.smooth_k else torch.zeros_like(k[:1], dtype=torch.float32)
        keys = quantise(k.float() - mean, groups, precision.qk).dequantise(torch.float64)
        shift = q_rows @ mean.double().mT * scale  # what K smoothing took from every score of a row
        exact_rows, q_rows = q_rows, quantise(q, groups, precision.qk).dequantise(torch.float64)[rows]
    else:
        exact_rows = q_rows
    scores = (q_rows @ keys.mT * scale).masked_fill_(~kept[:, block], -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if precision.pv == "fp8":
        weights, values = (
            quantise_weights(weights).dequantise(torch.float64),
            quantise_channels(v).dequantise(torch.float64),
        )
    out = weights @ values / total
    if not tail:
        return out
    # one softmax over the exact part, as a single key of logit LSE and value out, and the skipped blocks' means
    lse = top + total.log() + shift
    k_means, v_means = (block_means(x.unsqueeze(0).float(), layout)[0].double() for x in (k, v))
    sizes = layout.block_sizes.to(device=q.device, dtype=torch.float64).log()
    logits = (exact_rows @ k_means.mT * scale + sizes).masked_fill(kept, -math.inf)
    shares = torch.cat([lse, logits], dim=-1).softmax(-1)
    return shares[:, :1] * out + shares[:, 1:] @ v_means


def tolerance(precision: Precision, dtype: torch.dtype, tail: bool) -> float:
    """Largest relative L2 distance from :func:`sampled_attention` in the same precision that rounding explains.

    16-bit outputs are rounded once and their weights once before; float32 sums round often but far below any mistake.
    An fp8 weight carries a relative error of up to 2^-4, evenly spread 2^-4/sqrt(3) = .036; the kernel rounds relative
    to the running and the oracle to the final maximum, two such roundings of which no more than sqrt(2) adds up. With
    a tail an 8-bit precision rounds the block means too, which the oracle does not.
    """
    native = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 2)
    if precision.pv == "fp8":
        return 0.051 + (0.05 if tail else 0.0)
    return native + (0.02 if tail and precision.quantised else 0.0)
