"""Blocks chosen by the error they would cause if their means stood in for them, instead of by their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .budgeted import BudgetedPattern
from .dynamic import Heads
from .ranking import block_probabilities, keep_largest, split_text
from .rectangles import block_rows
from .registry import register

__all__ = ["ErrorRouting"]

#: Half a variance above this is not believed: e^2 times the mass already puts a block first.
_MOST = 2.0
#: Entries of D x D matrices in memory at a time.
_AT_A_TIME = 1 << 26


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorRouting(BudgetedPattern):
    """Each row keeps the k blocks of largest estimated error per cost. Meant for the pooled tail.

    If block j is represented by its means, query q misses, to first order in the scatter of the block's logits, the
    correlation of logit and value: P e^(sigma^2 / 2) * scale * |cov_j(v, k) q|, where sigma^2 = scale^2 q' C_j q is the
    variance of its logits over the block and e^(sigma^2 / 2) what that adds to the mass P that the means give. With
    the mean over the row's queries, Q_i = mean of q q', and M_j = cov_j(k, v) cov_j(v, k),

        error_ij^2 = P_ij^2 * exp(sigma_ij^2) * scale^2 <Q_i, M_j>,    sigma_ij^2 = scale^2 <Q_i, C_j>,

    P as in ``pooled_top_k``. The error counts every query of the row, and so does the cost, n_i * n_j token pairs:
    blocks are ranked by error_ij / n_j. Source: the error-aware routing of SVG-EAR, there on clusters of tokens and
    with an estimate of its own.

    Measured: relative L2 error of the output against dense attention, mean over heads, on q, k, v of the shipped small
    model (two prompts, 6 steps, noise .96, .83 and .50, three layers, 64-token tiles, pooled tail), at densities .11,
    .25 and .50. The estimate was picked on 5 of the 18 calls. On the other 13, of the same prompts, it gives .254,
    .158, .077; P itself .273, .192, .112; P times the spreads of values and keys .268, .188, .108; and the first-order
    term at the mean query alone, without e^(sigma^2 / 2), .268, .172, .088. One threshold a head instead of k blocks a
    row was no better. The D x D products cost little where blocks are many; on the small model's 2,304 tokens choosing
    takes 15% of the time of self-attention at density .36 (top-k: 2%).
    """

    name: ClassVar[str] = "error_routing"
    places = "nothing"

    def choose(self, heads: Heads) -> torch.Tensor:
        """The k largest of each row, bool [B,H,NV,NV]."""
        layout = heads.layout
        probability, _ = split_text(heads, block_probabilities(heads))
        variance, missed = heads.once("scatter", lambda: self.scatter(heads))
        error = probability * (variance / 2).clamp(max=_MOST).exp() * missed.clamp(min=0).sqrt()
        return keep_largest(error / heads.sizes[layout.video_blocks], self.count(layout))

    def scatter(self, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
        """sigma_ij^2 and scale^2 <Q_i, M_j> of each pair of video blocks, float32 [B,H,NV,NV] both."""
        layout = heads.layout
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (heads.q, heads.k, heads.v))
        means = (heads.k_means, heads.v_means)
        k_means, v_means = (x[:, :, layout.video_blocks].flatten(0, 1) for x in means)
        dim = q.shape[-1]
        step = max(1, _AT_A_TIME // (layout.num_video_blocks * dim * dim))
        found = []
        for begin in range(0, len(q), step):  # heads at a time, all of them unless the video is long
            part = slice(begin, begin + step)
            found.append(_scatter(q[part], k[part], v[part], k_means[part], v_means[part], layout))
        shape = (*heads.pooled_logits.shape[:2], layout.num_video_blocks, layout.num_video_blocks)
        variance, missed = (torch.cat(x).view(shape) * heads.scale**2 for x in zip(*found, strict=True))
        return variance, missed


def _scatter(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_means: torch.Tensor,
    v_means: torch.Tensor,
    layout: TokenLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """<Q_i, C_j> and <Q_i, M_j> of heads [N,S,D] with means [N,NV,D], float32 [N,NV,NV] both."""
    # a ranking needs few digits, and only 16-bit products run on tensor cores
    dtype = torch.bfloat16 if q.element_size() == 2 else torch.float32
    rows = block_rows(layout, None, q.device)[layout.video_blocks]
    sizes = layout.block_sizes.to(q.device)[layout.video_blocks, None]
    # shorter blocks are listed with repeated tokens, which must count nothing
    weight = (torch.arange(rows.shape[1], device=q.device) < sizes) / sizes.sqrt()

    def blocks(x: torch.Tensor, means: torch.Tensor | None = None) -> torch.Tensor:
        if layout.uniform:
            start = layout.video_start  # no token of a uniform layout is listed twice
            listed = x[:, start : start + layout.grid.tokens].unflatten(1, rows.shape).float()
        else:
            listed = x[:, rows].float()
        listed = listed if means is None else listed - means.unsqueeze(2)
        return (listed * weight.unsqueeze(-1)).to(dtype)

    queries, keys, values = blocks(q), blocks(k, k_means), blocks(v, v_means)
    second = (queries.mT @ queries).flatten(2)
    cross = keys.mT @ values
    variance = second @ (keys.mT @ keys).flatten(2).mT
    missed = second @ (cross @ cross.mT).flatten(2).mT
    return variance.float(), missed.float()
