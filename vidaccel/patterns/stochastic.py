"""Blocks drawn at random by their estimated attention, so that no block is left out in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .budgeted import BudgetedPattern
from .dynamic import Heads
from .params import check_count
from .ranking import block_probabilities, keep_largest, split_text
from .registry import register

__all__ = ["StochasticTopK"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class StochasticTopK(BudgetedPattern):
    """Each row keeps the k blocks of largest log P + temperature * g, with g from the standard Gumbel distribution.

    P as in ``pooled_top_k``. At temperature 1 this draws k blocks without replacement by their estimated attention, at
    0 it is top-k. A fixed choice leaves out the same blocks step after step, and that flickers where the choice
    switches over. Source: the stochastic bias of PASA; its budget for each step is not part of the pattern. Different
    here: one drawing for all samples, heads and layers of a step, so that a result does not depend on how heads are
    grouped.

    Args:
        temperature: weight of the random part, at least 0.
        seed: of the drawing, which is new in each step.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "stochastic_top_k"
    places = "nothing"

    temperature: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or self.temperature < 0:
            raise ConfigError(f"{self.name}: temperature is {self.temperature!r}; give a number of at least 0")
        check_count(self.name, "seed", self.seed, 0)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The k largest of each row after the drawing, bool [B,H,NV,NV]."""
        probability, _ = split_text(heads, block_probabilities(heads))
        score = probability.clamp(min=torch.finfo(probability.dtype).tiny).log()
        bias = self.bias(heads.layout, heads.step).to(score)
        return keep_largest(score + self.temperature * bias, self.count(heads.layout))

    def bias(self, layout: TokenLayout, step: int) -> torch.Tensor:
        """The Gumbel numbers of a step, float64 [NV,NV] on the CPU."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        blocks = layout.num_video_blocks
        drawn = torch.rand(blocks, blocks, dtype=torch.float64, generator=generator).clamp(1e-12, 1 - 1e-12)
        return -(-drawn.log()).log()

    def resolved(self, layout: TokenLayout) -> str:
        """Blocks kept of all, and the temperature."""
        return f"{super().resolved(layout)}, drawn at temperature {self.temperature:g}"
