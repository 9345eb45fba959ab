"""Blocks chosen by the error they would cause if their means stood in for them, instead of by their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .budgeted import BudgetedPattern
from .dynamic import Heads
from .ranking import block_probabilities, keep_largest, split_text
from .registry import register
from .spread import Groups, Spreads, spreads

__all__ = ["ErrorRouting"]


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
        found = heads.once("spreads", lambda: self.spreads(heads))
        error = found.errors(probability.flatten(0, 1)).view_as(probability)
        return keep_largest(error / heads.sizes[layout.video_blocks], self.count(layout))

    def spreads(self, heads: Heads) -> Spreads:
        """Of all video blocks, for the heads of all samples."""
        video = heads.layout.video_blocks
        blocks = Groups.blocks(heads.layout, heads.q.device)
        found = spreads(heads, (heads.k_means[:, :, video], heads.v_means[:, :, video]), blocks, blocks)
        return Spreads(*(torch.cat(x) for x in zip(*(part for _, part in found), strict=True)))
