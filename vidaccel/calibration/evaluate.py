"""What every candidate would have made of one attention call, all candidates at once.

For a block of queries, attention is a quotient of sums over key blocks. So the sums are taken once a block,

    l_j = sum of exp(s - m) over the keys of block j,      a_j = sum of exp(s - m) v over them,
    l'_j, a'_j = the same for the block's mean key and value, n_j times   (the pooled tail)

and a candidate with the kept blocks K is ``(sum_K a + sum_rest a') / (sum_K l + sum_rest l')``: a product of its 0/1
row with small matrices. A hundred candidates cost little more than one. A precision needs sums of its own, from
rounded q, k and v, so pattern, precision and compensation are always judged jointly.

Q, K and V are rounded exactly as the kernels round them; P relative to the row's maximum over all keys, where a kernel
takes that over the keys it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.quantise import round_queries_and_keys, round_values, round_weights
from ..layout import TokenLayout
from ..pooling import block_means, log_block_sizes
from ..types import PRECISIONS, Precision

__all__ = ["Row", "Scores", "evaluate"]


@dataclass(frozen=True, eq=False)
class Row:
    """Candidates of one precision.

    Args:
        precision: how QK^T and PV are computed.
        keep: blocks that each candidate keeps, bool [C, H or 1, n, NB] for the n sampled query blocks.
        tail: candidates that have the pooled tail, bool [C].
    """

    precision: Precision
    keep: torch.Tensor
    tail: torch.Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """Candidates of one precision against exact attention, sums over the sampled query tokens.

    Args:
        error: squared error of the output, [C, H]; with a metric, that of the output after the projection.
        energy: squared norm of the exact output, measured alike, [H].
        cosine: sum of the cosines of output and exact output, [C, H].
        mass: sum of the attention mass on kept blocks, [C, H].
        pairs: kept (query, key) pairs, [C, H].
        tokens: query tokens sampled.
    """

    error: torch.Tensor
    energy: torch.Tensor
    cosine: torch.Tensor
    mass: torch.Tensor
    pairs: torch.Tensor
    tokens: int


def evaluate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    blocks: Sequence[int],
    rows: Sequence[Row],
    *,
    scale: float | None = None,
    metric: torch.Tensor | None = None,
) -> list[Scores]:
    """Scores of the candidates of each row.

    Args:
        q, k, v: [S,H,D] in layout order, any dtype; computed in float32.
        blocks: numbers of the n query blocks to sample.
        scale: multiplies q k^T, 1/sqrt(D) by default.
        metric: float32 [H,D,D], W^T W of each head's part of the output projection, or ``None`` for the identity.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
    heads = q.shape[0]
    means = block_means(k, layout), block_means(v, layout), log_block_sizes(layout, q.device)
    totals = [_empty(row.keep.shape[0], heads, q.device) for row in rows]
    exact_inputs = _Rounded(
        q, k, v, torch.zeros_like(k[..., :1, :]), torch.zeros_like(v[..., :1, :]), PRECISIONS["native"]
    )
    rounded = [_Rounded.of(q, k, v, layout, row.precision) if row.precision.quantised else exact_inputs for row in rows]
    sizes, padded = layout.block_sizes.to(q.device), _padded(layout, q.device)
    tokens = 0
    for place, block in enumerate(blocks):
        begin, end = (int(layout.block_offsets[block + i]) for i in (0, 1))
        tokens += end - begin
        for h in range(heads):
            original = q[h, begin:end]
            exact_sums = _sums(exact_inputs, h, begin, end, original, padded, scale)
            out = exact_sums.values.sum(1) / exact_sums.weights.sum(1, keepdim=True)
            gram = None if metric is None else metric[h]
            mass = exact_sums.weights / exact_sums.weights.sum(1, keepdim=True)
            for row, total, inputs in zip(rows, totals, rounded, strict=True):
                sums = exact_sums
                if row.precision.quantised:
                    sums = _sums(inputs, h, begin, end, original, padded, scale)
                tail = _tail(original, means[0][h], means[1][h], means[2], sums.top, scale)
                keep = row.keep[:, h if row.keep.shape[1] > 1 else 0, place].float()
                found = _candidates(sums, tail, keep, row.tail, inputs.v_mean[h])
                total.add(h, found, out, gram, keep @ mass.sum(0), keep @ sizes.float() * (end - begin))
    return [total.scores(tokens) for total in totals]


@dataclass(frozen=True, eq=False)
class _Rounded:
    """What a precision multiplies, [H,S,D], and what smoothing took away before, [H,1,D].

    Q smoothing's term is a product of its own, ``q_mean (k - k_mean)^T``, so it stands in further channels of q and k.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_mean: torch.Tensor
    v_mean: torch.Tensor
    precision: Precision

    @staticmethod
    def of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, precision: Precision) -> _Rounded:
        q_rounded, k_rounded, q_mean, k_mean = round_queries_and_keys(q, k, layout, precision)
        v_rounded, v_mean = round_values(v, layout, precision)
        if precision.smooth_q:
            q_rounded, k_rounded = torch.cat([q_rounded, q_mean], -1), torch.cat([k_rounded, k - k_mean], -1)
        return _Rounded(q_rounded, k_rounded, v_rounded, k_mean, v_mean, precision)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Per query token and key block: top [L], weights [L,NB] and weighted values [L,NB,D]."""

    top: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor


def _padded(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """Token numbers of each block, int64 [NB, longest]; short blocks are filled up with S, one past the end."""
    sizes, starts = layout.block_sizes, layout.block_offsets[:-1]
    rank = torch.arange(int(sizes.max()))
    index = starts[:, None] + rank
    return torch.where(rank < sizes[:, None], index, layout.tokens).to(device)


def _sums(
    x: _Rounded, h: int, begin: int, end: int, original: torch.Tensor, padded: torch.Tensor, scale: float
) -> _Sums:
    scores = x.q[h, begin:end] @ x.k[h].mT * scale
    scores = scores + original @ x.k_mean[h].mT * scale  # the same for all keys: it matters only beside the tail
    top = scores.amax(-1)
    weights = (scores - top[:, None]).exp()
    blocks, longest = padded.shape
    by_block = torch.nn.functional.pad(weights, (0, 1))[:, padded.reshape(-1)].view(-1, blocks, longest)
    values = torch.nn.functional.pad(x.v[h], (0, 0, 0, 1))[padded.reshape(-1)].view(blocks, longest, -1)
    multiplied = round_weights(by_block, x.precision, [longest])
    return _Sums(top, by_block.sum(-1), torch.bmm(multiplied.transpose(0, 1), values).transpose(0, 1))


def _tail(
    q: torch.Tensor,
    k_means: torch.Tensor,
    v_means: torch.Tensor,
    log_sizes: torch.Tensor,
    top: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [L,NB] and mean values [NB,D] of the blocks' stand-ins, relative to the same maximum."""
    return (q @ k_means.mT * scale + log_sizes - top[:, None]).exp(), v_means


def _candidates(
    sums: _Sums,
    tail: tuple[torch.Tensor, torch.Tensor],
    keep: torch.Tensor,
    has_tail: torch.Tensor,
    v_mean: torch.Tensor,
) -> torch.Tensor:
    """Outputs [C, L, D] of the candidates that keep these blocks, float [C, NB]."""
    tokens, blocks, channels = sums.values.shape
    numerator = (keep @ sums.values.transpose(0, 1).reshape(blocks, -1)).view(-1, tokens, channels)
    denominator = keep @ sums.weights.mT
    numerator = numerator + denominator[..., None] * v_mean
    if bool(has_tail.any()):
        rest = (1 - keep) * has_tail[:, None]
        weights, means = tail
        numerator = numerator + torch.einsum("cj,lj,jd->cld", rest, weights, means)
        denominator = denominator + rest @ weights.mT
    # kept keys may all lie so far below the maximum over all keys that their sum is 0: that output counts as 0
    return numerator / denominator.clamp_min(1e-30)[..., None]


@dataclass(eq=False)
class _Total:
    error: torch.Tensor
    energy: torch.Tensor
    cosine: torch.Tensor
    mass: torch.Tensor
    pairs: torch.Tensor

    def add(
        self,
        h: int,
        found: torch.Tensor,
        exact: torch.Tensor,
        gram: torch.Tensor | None,
        mass: torch.Tensor,
        pairs: torch.Tensor,
    ) -> None:
        """Adds one head's outputs [C,L,D] for one query block, against the exact ones [L,D]."""
        self.error[:, h] += _square(found - exact, gram).sum(-1)
        self.energy[h] += _square(exact, gram).sum()
        self.cosine[:, h] += torch.nn.functional.cosine_similarity(found, exact[None], dim=-1).sum(-1)
        self.mass[:, h] += mass
        self.pairs[:, h] += pairs

    def scores(self, tokens: int) -> Scores:
        return Scores(self.error, self.energy, self.cosine, self.mass, self.pairs, tokens)


def _empty(candidates: int, heads: int, device: torch.device) -> _Total:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=device, dtype=torch.float64)

    each = (candidates, heads)
    return _Total(zeros(*each), zeros(heads), zeros(*each), zeros(*each), zeros(*each))


def _square(x: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """x^T G x along the last axis."""
    return (x * (x if gram is None else x @ gram)).sum(-1)
