"""PASA: more blocks in the steps where the denoising trajectory bends, and a little chance in which ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .dynamic import Heads
from .params import check_count
from .ranking import blocks_of, keep_largest
from .registry import register
from .stochastic import StochasticTopK

__all__ = ["Pasa"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Pasa(StochasticTopK):
    """Each row keeps the k blocks of largest log P + temperature * g, with k and P that go with the moment.

    - Budget: with v the transformer's output, which is the velocity of the trajectory, c = norm(v_t-1 - v_t-2) /
      norm(v_t-2) is how much it has just turned, and k = ceil(density * f * NV), f = (c / mean c so far)^gain between
      ``least`` and ``most``. Steps without two outputs before them have f = 1. Each transformer and guidance branch
      counts for itself.
    - Scores: a block is cut into ``groups`` runs of tokens. P_ij is the mean over the runs of i of what the runs of j
      hold of softmax(scale * mean q . mean k + log n) over all runs, text's too.
    - Chance: as in :class:`StochasticTopK`.

    Source: PASA (Precision-Allocated Sparse Attention) for the three ideas. Its formulas are not public in code; those
    of the budget and of the scores are ours. Measured as in :class:`~.ordered.Ordered`, without chance, scores of 2 and
    of 4 groups are no better than those of block means (errors .268, .185, .110 and .268, .184, .110 against .269,
    .183, .110). Nothing was measured about flicker.

    Args:
        gain: how strongly the budget follows the curvature; 0 not at all.
        least, most: bounds of f.
        groups: runs of tokens in a block.
        aim, temperature, seed: see :class:`StochasticTopK`.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "pasa"
    stateful = True
    needs_curvature = True

    gain: float = 1.0
    least: float = 0.5
    most: float = 2.0
    groups: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, low, high in (("gain", 0.0, math.inf), ("least", 0.0, 1.0), ("most", 1.0, math.inf)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise ConfigError(f"{self.name}: {field} is {value!r}; give a number {bounds}")
        check_count(self.name, "groups", self.groups)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The k largest of each row after the drawing, bool [B,H,NV,NV]."""
        layout = heads.layout
        probability = self.probability(heads)
        score = probability.clamp(min=torch.finfo(probability.dtype).tiny).log()
        count = blocks_of(min(1.0, self.aim * self.factor(heads)), layout.num_video_blocks)
        return keep_largest(score + self.temperature * self.bias(layout, heads.step).to(score), count)

    def factor(self, heads: Heads) -> float:
        """f of this step; notes its curvature for the mean."""
        if heads.curvature is None:
            return 1.0
        seen: list[float] = heads.memory.setdefault("curvatures", [])
        seen.append(heads.curvature)
        mean = sum(seen) / len(seen)
        return min(self.most, max(self.least, (heads.curvature / mean) ** self.gain)) if mean > 0 else 1.0

    def probability(self, heads: Heads) -> torch.Tensor:
        """P of each pair of video blocks, float32 [B,H,NV,NV]."""
        layout = heads.layout
        run, sizes = _runs(layout, self.groups)
        run, sizes = run.to(heads.q.device), sizes.to(heads.q.device)
        q, k = (_means(x, run, sizes) for x in (heads.q, heads.k))
        logits = (q * heads.scale) @ k.mT + sizes.log()  # runs without tokens get -inf
        weights = logits.softmax(-1).unflatten(-1, (-1, self.groups)).sum(-1)
        rows = weights.unflatten(2, (-1, self.groups))
        real = (sizes > 0).view(-1, self.groups, 1).to(rows)
        video = layout.video_blocks
        return ((rows * real).sum(3) / real.sum(1))[:, :, video, video]

    def resolved(self, layout: TokenLayout) -> str:
        """Blocks kept of all, and within which bounds."""
        low, high = (blocks_of(min(1.0, self.aim * f), layout.num_video_blocks) for f in (self.least, self.most))
        return f"{super().resolved(layout)}, {low} to {high} by the curvature, {self.groups} means a block"


def _runs(layout: TokenLayout, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The run of each token, int64 [S], and the size of each, float32 [NB * groups]; short blocks leave some empty."""
    block = layout.block_of_token.cpu()
    within = torch.arange(layout.tokens) - layout.block_offsets[block]
    run = block * groups + within * groups // layout.block_sizes[block]
    return run, torch.bincount(run, minlength=layout.num_blocks * groups).float()


def _means(x: torch.Tensor, run: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mean of each run of x [B,S,H,D], float32 [B,H,R,D], float64 for float64."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).transpose(1, 2)
    sums = wide.new_zeros(*wide.shape[:2], len(sizes), wide.shape[-1]).index_add_(2, run, wide)
    return sums / sizes.clamp(min=1)[:, None].to(sums)
