"""Attention in few bits on the CPU, rounded exactly as the precision says and multiplied in float32; and skipping.

For measuring what a precision, or passing over blocks inside the kernel, costs in quality where nothing gains by it.
It is slower than the model's own dtype, so it runs only where a plan asks for that, under a name that says what it is.

::

    q', k', v' = round(q, k, v)
    for each query block i with the kept keys K:
        s = scale * (q'_i k'_K^T + q_mean_i (k_K - k_mean)^T)         the second term with Q smoothing only
        s = -inf in blocks of K that are passed over                  with skips only
        p = exp(s - max s)
        o_i = round(p) v'_K / sum p + v_mean

Like the oracle, it rounds P relative to the row's final maximum and computes the pooled tail from unrounded q, k and v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..blockmask import BlockMask
from ..errors import KernelError
from ..layout import TokenLayout
from ..pooling import block_means, log_block_sizes
from ..types import PRECISIONS, Precision
from .contract import AttentionResult, KernelRequest, Skips, check_inputs
from .gradient import forward_only
from .merge import merge
from .quantise import round_queries_and_keys, round_values, round_weights
from .tail import pooled_tail

__all__ = ["block_sparse_attention", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(request: KernelRequest) -> str | None:
    """Why this kernel cannot run the request, or ``None``."""
    if not request.precision.quantised and not request.skip:
        return f"emulates few-bit arithmetic; precision {request.precision.name!r} is the model's own"
    if request.device != "cpu":
        return f"emulates on the CPU what it measures the quality of; on {request.device} it would only be slow"
    if request.dtype not in _DTYPES:
        return f"{request.dtype} is not supported; valid are {', '.join(map(str, _DTYPES))}"
    if request.precision.scale_channels == "pairs" and request.head_dim % 2:
        return f"{request.head_dim} channels cannot be scaled by pairs"
    return None


@forward_only
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
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; arguments as :class:`.contract.Kernel` has them.

    Returns:
        The output [B,S,H,D] in q's dtype and, if asked, the LSE [B,H,S].

    Raises:
        LayoutError: if shapes and layout do not fit together.
        KernelError: if :func:`why_not` has a reason.
    """
    check_inputs(q, k, v, layout, mask)
    reason = why_not(KernelRequest.of(q, precision, tail=tail, return_lse=return_lse, skip=skips is not None))
    if reason:
        raise KernelError(f"the emulation cannot run this: {reason}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    heads_first = (x.transpose(1, 2).float() for x in (q, k, v))
    operands = _Operands.of(*heads_first, layout=layout, precision=precision, tail=tail)
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=torch.float32)
    lse = torch.empty(out.shape[:-1], dtype=torch.float32)
    for work in _work(mask, layout, *out.shape[:2]):
        place = (work.sample, work.heads, work.rows)
        out[place], lse[place] = operands.attend(work, scale, skips)
    result = out.transpose(1, 2).to(q.dtype)
    return (result, lse) if return_lse else result


@dataclass(frozen=True, eq=False)
class _Work:
    """One query block of heads that keep the same keys.

    Args:
        sample: number in the batch.
        heads: the heads.
        rows: the query tokens.
        kept: the key blocks, int64 [n].
        columns: their tokens, int64 [K].
        sizes: how many tokens each of them has.
        tokens: which token pairs are kept, bool [h or 1, L, K], or ``None`` for all.
    """

    sample: int
    heads: slice
    rows: slice
    kept: torch.Tensor
    columns: torch.Tensor
    sizes: list[int]
    tokens: torch.Tensor | None


def _work(mask: BlockMask, layout: TokenLayout, batch: int, heads: int) -> Iterator[_Work]:
    offsets, sizes = layout.block_offsets.tolist(), layout.block_sizes.tolist()
    rank = torch.arange(max(sizes))
    # token numbers of each block; short blocks are filled up with -1
    members = torch.where(rank < layout.block_sizes[:, None], layout.block_offsets[:-1, None] + rank, -1)
    rule = None if mask.rule is None else mask.rule.token_mask()
    for b in range(batch):
        for h in range(mask.shape[1]):
            together = slice(h, h + 1) if mask.shape[1] > 1 else slice(0, heads)
            lists = mask.kv_indices[b if mask.shape[0] > 1 else 0, h].long()
            counts = mask.kv_num_blocks[b if mask.shape[0] > 1 else 0, h].tolist()
            allowed = None if rule is None else rule[h : h + 1] if len(rule) > 1 else rule
            for i, count in enumerate(counts):
                kept, rows = lists[i, :count], slice(offsets[i], offsets[i + 1])
                columns = members[kept].flatten()
                columns = columns[columns >= 0]
                tokens = None if allowed is None else allowed[:, rows][..., columns]
                yield _Work(b, together, rows, kept, columns, [sizes[j] for j in kept.tolist()], tokens)


@dataclass(frozen=True, eq=False)
class _Operands:
    """What is multiplied, float32: scores are products of q and k [B,H,S,.], the output one with v [B,H,S,D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    v_mean: torch.Tensor
    lost: torch.Tensor
    original_q: torch.Tensor
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    precision: Precision

    @staticmethod
    def of(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: TokenLayout, precision: Precision, tail: bool
    ) -> _Operands:
        """Rounds q, k, v [B,H,S,D]. ``lost`` is what K smoothing takes from every score of a row, [B,H,S]."""
        q_rounded, k_rounded, q_mean, k_mean = round_queries_and_keys(q, k, layout, precision)
        if precision.smooth_q:
            # the mean's products are a term of their own; in further channels one matrix product makes both
            q_rounded, k_rounded = torch.cat([q_rounded, q_mean], -1), torch.cat([k_rounded, k - k_mean], -1)
        v_rounded, v_mean = round_values(v, layout, precision)
        means = None
        if tail:
            shape = q.shape[:2]
            pooled = (block_means(x.flatten(0, 1), layout).unflatten(0, shape) for x in (k, v))
            means = (*pooled, log_block_sizes(layout, q.device))  # type: ignore[assignment]
        return _Operands(q_rounded, k_rounded, v_rounded, v_mean, (q * k_mean).sum(-1), q, means, precision)

    def attend(self, work: _Work, scale: float, skips: Skips | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [h,L,D] and LSE [h,L] of one query block."""
        heads = (work.sample, work.heads)
        q, k, v = self.q[heads][:, work.rows], self.k[heads][:, work.columns], self.v[heads][:, work.columns]
        scores = q @ k.mT * scale
        if work.tokens is not None:
            scores = scores.masked_fill(~work.tokens, -math.inf)
        if skips is not None:
            scores = _pass_over(scores, work, skips)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        out = round_weights(weights, self.precision, work.sizes) @ v / total + self.v_mean[heads]
        lse = (top + total.log()).squeeze(-1) + self.lost[heads][:, work.rows] * scale
        if self.means is None or len(work.sizes) == self.means[2].numel():
            return out, lse
        k_means, v_means, bias = self.means
        bias = bias.index_fill(0, work.kept, -math.inf).expand(len(out), -1)
        rows = self.original_q[heads][:, work.rows]
        return merge(out, lse, *pooled_tail(rows, k_means[heads], v_means[heads], bias, scale))


def _pass_over(scores: torch.Tensor, work: _Work, skips: Skips) -> torch.Tensor:
    """Scores [h,L,K] with -inf in the blocks that are passed over, which are counted in ``skips``; blocks go whole."""
    largest = torch.stack([block.amax(-1) for block in scores.split(work.sizes, dim=-1)], dim=-1)
    # what is passed over is never the largest so far, so it makes no difference to the maximum of those behind it
    running = largest.cummax(-1).values
    # a row that a rule left nothing of so far has no maximum, and nothing to lose
    distance = largest - running.masked_fill(running.isneginf(), 0.0)
    passed = distance.amax(1) < skips.threshold[work.heads, None]
    sizes = torch.tensor(work.sizes)
    skips.skipped[work.sample, work.heads] += (passed * sizes).sum(-1) * scores.shape[1]
    return scores.masked_fill(passed.repeat_interleave(sizes, dim=-1)[:, None], -math.inf)
