"""Masks kept from one step to the next while queries and keys hardly change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .dynamic import DynamicPattern, Heads
from .registry import register

__all__ = ["Reuse"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Reuse(DynamicPattern):
    """Another pattern's blocks, chosen anew for a head only when its queries or keys have drifted.

    The drift of a head is the larger of |X - X'| / |X'| over the block means X of its queries and of its keys, where X'
    are those at the time its blocks were chosen, so that slow changes add up. In a batch the sample that drifted most
    decides for all. Heads above ``drift`` get new blocks, the others keep theirs. Each guidance branch remembers for
    itself. Source: HASTE, which calibrates the bound for each head; here it is one number for the heads of a pattern.

    Args:
        pattern: what chooses the blocks; it sees the drifted heads only and remembers nothing between calls.
        drift: the largest relative change with which a mask is kept; 0 keeps it while nothing changes at all.

    Raises:
        ConfigError: if the pattern is fixed by the token grid or itself remembers, or the drift is below 0.
    """

    name: ClassVar[str] = "reuse"
    stateful: ClassVar[bool] = True

    pattern: DynamicPattern
    drift: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, DynamicPattern) or isinstance(self.pattern, Reuse):
            raise ConfigError(
                f"{self.name}: pattern is {self.pattern!r}; give one that chooses its blocks in each call as a mapping"
                " with 'name' and its parameters"
            )
        if type(self.pattern).order is not DynamicPattern.order or self.pattern.stateful:
            raise ConfigError(
                f"{self.name}: {self.pattern.name} has an order of its own or remembers, so its blocks do not stay the"
                " same tokens; put reuse inside of ordered, and leave it out around clusters"
            )
        number = isinstance(self.drift, int | float) and not isinstance(self.drift, bool)
        if not number or self.drift < 0:
            raise ConfigError(f"{self.name}: drift is {self.drift!r}; give a number of at least 0")

    def choose(self, heads: Heads) -> torch.Tensor:
        """The blocks of this call, kept or new, bool [B,H,NV,NV]."""
        memory = heads.memory
        now = torch.stack([heads.q_means, heads.k_means])
        if "kept" not in memory or memory["means"].shape != now.shape or memory["layout"] != heads.layout:
            fresh = replace(heads, memory={})
            memory.update(kept=self.pattern.choose(fresh), means=now, layout=heads.layout)
            return memory["kept"].clone()
        moved = (self.changes(memory["means"], now) > self.drift).nonzero().squeeze(-1)
        if len(moved):
            kept, means = memory["kept"].clone(), memory["means"].clone()
            kept[:, moved] = self.pattern.choose(heads.only(moved))
            means[:, :, moved] = now[:, :, moved]
            memory.update(kept=kept, means=means)
        return memory["kept"].clone()

    @staticmethod
    def changes(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """Relative change of each head, float32 [H] of means [2,B,H,NB,D]: the largest over q, k and samples."""
        size = before.flatten(-2).norm(dim=-1).clamp(min=torch.finfo(before.dtype).tiny)
        return ((now - before).flatten(-2).norm(dim=-1) / size).amax((0, 1))

    def density(self, layout: TokenLayout) -> float | None:
        """That of the pattern inside."""
        return self.pattern.density(layout)

    def resolved(self, layout: TokenLayout) -> str:
        """The pattern inside and the bound."""
        return f"{self.pattern.name} ({self.pattern.resolved(layout)}), kept up to a drift of {self.drift:g}"
