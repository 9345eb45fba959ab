"""The oracle: block-sparse attention as its definition reads, in float64, with every score in memory.

Quantised precisions are simulated: values are rounded with exactly the scales of the real kernels
(:mod:`.quantise`) and then multiplied exactly, so what remains between a real kernel and this one is the
accumulation. Two things a real kernel may do otherwise: P is rounded relative to the row's final maximum here
(a streaming kernel uses the maximum so far), and the pooled tail is computed from unrounded q, k and v.
"""

from __future__ import annotations

import math

import torch

from ..blockmask import BlockMask
from ..errors import KernelError, LayoutError
from ..layout import TokenLayout
from ..types import PRECISIONS, Precision
from .contract import AttentionResult, KernelRequest, Skips, check_inputs
from .quantise import round_queries_and_keys, round_values, round_weights

__all__ = ["block_sparse_attention", "why_not"]


def why_not(request: KernelRequest) -> str | None:
    """Why the oracle cannot run the request, or ``None``."""
    if not request.dtype.is_floating_point:
        return f"{request.dtype} is not a floating dtype"
    if request.device == "mps":
        return "mps has no float64; move the tensors to the CPU"
    if request.device == "meta":
        return "meta tensors hold no data to attend"
    return None


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    *,
    scale: float | None = None,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
    return_lse: bool = False,
    skips: Skips | None = None,
    compute_dtype: torch.dtype = torch.float64,
    token_mask: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; arguments as :class:`.contract.Kernel` has them.

    Args:
        compute_dtype: dtype of everything but the roundings to few bits.
        token_mask: boolean, broadcasts to [B,H,S,S]: token pairs to keep besides what ``mask`` says. Its rows must
            keep a token.
        out_dtype: dtype of the output, ``None`` for q's; ``compute_dtype`` spares the last rounding.

    Returns:
        The output [B,S,H,D] and, if asked, the LSE [B,H,S] in float32 (in float64 if ``out_dtype`` is).

    Raises:
        LayoutError: if shapes and layout do not fit together, or ``token_mask`` leaves a row empty.
        KernelError: if :func:`why_not` has a reason.
    """
    check_inputs(q, k, v, layout, mask)
    reason = why_not(KernelRequest.of(q, precision, tail=tail, return_lse=return_lse, skip=skips is not None))
    if reason:
        raise KernelError(f"the reference cannot run this: {reason}")
    out_dtype = q.dtype if out_dtype is None else out_dtype
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keep = mask.token_mask(layout).to(q.device)
    if token_mask is not None:
        keep = keep & token_mask
        if not keep.any(-1).all():
            raise LayoutError("token_mask leaves a query row without any key; keep at least one")
    q, k, v = (x.transpose(1, 2).to(compute_dtype) for x in (q, k, v))

    scores = _scores(q, k, layout, precision, scale).masked_fill(~keep, -math.inf)
    if skips is not None:
        scores = _skip(scores, layout, mask, skips)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = _weighted_values(weights, v, layout, precision, total)
    # K smoothing changed every score of a row by the same amount: the LSE takes it back
    lse = (top + total.log()).squeeze(-1) + _smoothed_away(q, k, precision, scale)
    if tail:
        out, lse = _with_tail(out, lse, q, k, v, layout, mask, scale)
    out = out.transpose(1, 2).to(out_dtype)
    return (out, lse.to(torch.float64 if out_dtype == torch.float64 else torch.float32)) if return_lse else out


def _skip(scores: torch.Tensor, layout: TokenLayout, mask: BlockMask, skips: Skips) -> torch.Tensor:
    """Scores [B,H,S,S] with -inf where a block is passed over; counts those token pairs in ``skips``."""
    limit = skips.threshold.to(scores)[:, None]
    listed = mask.dense.to(scores.device).expand(*scores.shape[:2], -1, -1)
    most_rows, most_keys = skips.pieces or (layout.tokens, layout.tokens)
    row_sizes, row_block = _pieces(layout, most_rows)
    key_sizes, key_block = _pieces(layout, most_keys)
    counts = torch.tensor(row_sizes, device=scores.device)
    running = torch.full_like(scores[..., 0], -math.inf)
    kept = []
    for j, columns in enumerate(scores.split(key_sizes, dim=-1)):
        local = columns.amax(-1)
        running = torch.maximum(running, local)
        # a row whose partial blocks kept nothing so far has no maximum, and nothing to lose
        distance = local - running.masked_fill(running.isneginf(), 0.0)
        nearest = torch.stack([rows.amax(-1) for rows in distance.split(row_sizes, dim=-1)], dim=-1)
        passed = listed[..., row_block, key_block[j]] & (nearest < limit)
        skips.skipped.add_((passed * counts).sum(-1) * key_sizes[j])
        rows = passed.repeat_interleave(counts, dim=-1)
        kept.append(columns.masked_fill(rows.unsqueeze(-1), -math.inf))
    return torch.cat(kept, dim=-1)


def _pieces(layout: TokenLayout, most: int) -> tuple[list[int], list[int]]:
    """Blocks cut into pieces of at most ``most`` tokens: the size of each piece, and its block."""
    sizes, blocks = [], []
    for block, size in enumerate(layout.block_sizes.tolist()):
        cut = [most] * (size // most) + ([size % most] if size % most else [])
        sizes += cut
        blocks += [block] * len(cut)
    return sizes, blocks


def _scores(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, precision: Precision, scale: float) -> torch.Tensor:
    """scale * q k^T [B,H,S,S] as the precision computes it, shifted per row if it smooths K."""
    rounded_q, rounded_k, q_mean, k_mean = round_queries_and_keys(q, k, layout, precision)
    scores = rounded_q @ rounded_k.mT * scale
    if precision.smooth_q:
        # q = q_mean + rest: only the rest is rounded, and the mean's part of the scores is added unrounded
        scores = scores + q_mean @ (k - k_mean).mT * scale
    return scores


def _smoothed_away(q: torch.Tensor, k: torch.Tensor, precision: Precision, scale: float) -> torch.Tensor:
    """What K smoothing took from every score of a row: scale * q.k_mean, [B,H,S]."""
    if not precision.smooth_k:
        return torch.zeros_like(q[..., 0])
    k_mean = k.float().mean(-2, keepdim=True).to(q.dtype)
    return (q * k_mean).sum(-1) * scale


def _weighted_values(
    weights: torch.Tensor, v: torch.Tensor, layout: TokenLayout, precision: Precision, total: torch.Tensor
) -> torch.Tensor:
    """weights @ v / total [B,H,S,D]; ``total`` is the sum of the unrounded weights."""
    if precision.pv == "native":
        return weights @ v / total
    rest, v_mean = round_values(v, layout, precision)
    return round_weights(weights, precision, layout.block_sizes.tolist()) @ rest / total + v_mean


def _with_tail(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the exact part, taken as a single key of logit ``lse`` and value ``out``, and the means."""
    sizes = layout.block_sizes.tolist()
    k_means, v_means = (torch.stack([p.mean(-2) for p in x.split(sizes, dim=-2)], dim=-2) for x in (k, v))
    log_sizes = layout.block_sizes.to(device=q.device, dtype=q.dtype).log()
    kept = mask.dense.to(q.device)[:, :, layout.block_of_token.to(q.device)]
    logits = (q @ k_means.mT * scale + log_sizes).masked_fill(kept, -math.inf)
    logits = torch.cat([lse.unsqueeze(-1), logits], dim=-1)
    weights = logits.softmax(-1)
    return weights[..., :1] * out + weights[..., 1:] @ v_means, logits.logsumexp(-1)
