"""Several patterns at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .base import StaticPattern
from .pairs import TokenRule
from .registry import register

__all__ = ["Union"]

#: Counting a union exactly doubles in work with every member; published systems unite two or three.
_MOST = 6


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Union(StaticPattern):
    """Keeps what any member keeps, each rounded to blocks by its own rule.

    Args:
        patterns: two to six static patterns, counting the members of unions among them.

    Raises:
        ConfigError: if there are too few or too many members, or one is not a static pattern.
    """

    name: ClassVar[str] = "union"

    patterns: tuple[StaticPattern, ...]

    def __post_init__(self) -> None:
        given = self.patterns
        if not isinstance(given, list | tuple) or len(given) < 2:
            raise ConfigError(f"{self.name}: patterns is {given!r}; give a list of 2 to {_MOST} patterns")
        for member in given:
            if not isinstance(member, StaticPattern):
                raise ConfigError(
                    f"{self.name}: {member!r} is not a static pattern; give each as a mapping with 'name' and its"
                    " parameters"
                )
            if member.cuts_blocks:
                raise ConfigError(
                    f"{self.name}: {member!r} masks tokens inside blocks, and a union is of whole blocks; set"
                    " exact=false there"
                )
        object.__setattr__(self, "patterns", tuple(given))
        if self._size > _MOST:
            raise ConfigError(f"{self.name}: {self._size} patterns in all are united; give 2 to {_MOST}")

    @property
    def _size(self) -> int:
        return sum(member._size if isinstance(member, Union) else 1 for member in self.patterns)

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """The members' rules."""
        return tuple(rule for member in self.patterns for rule in member.rules(layout))

    def select(self, layout: TokenLayout) -> torch.Tensor:
        """Pairs of video blocks that any member keeps, bool [NV, NV]."""
        return torch.stack([member.video_blocks(layout) for member in self.patterns]).any(0)

    def resolved(self, layout: TokenLayout) -> str:
        """The members with their windows."""
        return " + ".join(f"{m.name} ({m.resolved(layout)})" for m in self.patterns)
