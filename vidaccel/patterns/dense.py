"""Everything attends everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..layout import TokenLayout
from .base import StaticPattern
from .pairs import TokenRule
from .registry import register

__all__ = ["Dense"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Dense(StaticPattern):
    """Full attention."""

    name: ClassVar[str] = "dense"

    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """One rule without a limit."""
        return (TokenRule.axes(layout.grid),)

    def resolved(self, layout: TokenLayout) -> str:
        """The whole grid."""
        return f"all of {layout.grid}"
