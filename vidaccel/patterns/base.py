"""What every pattern is: a rule that says which blocks attend which; static ones are rules over video tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar

import torch

from ..axisrule import AxisRule
from ..blockmask import BlockMask
from ..errors import ConfigError
from ..layout import TokenLayout
from ..types import TileShape
from .pairs import TokenRule, block_pair_sizes, count_columns, count_pairs, count_union
from .params import check_coverage

__all__ = ["CoveragePattern", "Pattern", "StaticPattern"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pattern(ABC):
    """A rule that says which blocks of the video each block attends.

    A subclass is a frozen dataclass, made with ``eq=False``: a :class:`StaticPattern`, or a
    :class:`~.dynamic.DynamicPattern`, which looks at q and k.
    """

    name: ClassVar[str]
    #: Whether the blocks depend on q and k, so that they are chosen at run time.
    dynamic: ClassVar[bool] = False

    def __eq__(self, other: object) -> bool:
        # by repr, because 1 == 1.0 in Python while a window of 1 is one tile and a window of 1.0 the whole axis
        return isinstance(other, Pattern) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def variable(self) -> bool:
        """Whether heads get blocks of their own instead of the layout's (:mod:`vidaccel.variablemask`)."""
        return False

    @property
    def trained(self) -> tuple[str, ...]:
        """Groups of trained tensors without which it cannot choose, see :mod:`vidaccel.configs.weights`.

        Those of the patterns among its parameters, unless a subclass adds its own.
        """
        values = [getattr(self, field.name) for field in fields(self)]
        nested = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        found = [group for part in nested if isinstance(part, Pattern) for group in part.trained]
        return tuple(dict.fromkeys(found))

    @abstractmethod
    def resolved(self, layout: TokenLayout) -> str:
        """The pattern's parameters as they come out on this layout, for reports."""

    @abstractmethod
    def density(self, layout: TokenLayout) -> float | None:
        """Share of the video's token pairs that the kept blocks hold, text not counted; ``None`` if only runs tell."""

    @abstractmethod
    def describe(self, layout: TokenLayout) -> str:
        """One line for reports: name, parameters on this layout, and what of all token pairs stays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticPattern(Pattern):
    """A rule over video tokens, rounded out to the blocks of a layout.

    A subclass gives :attr:`name`, :meth:`rules` and :meth:`resolved`. A block pair is kept as soon as the rule keeps
    one of its token pairs, so rounding only ever adds. The returned tensors are cached per (pattern, layout): do not
    write into them.
    """

    @abstractmethod
    def rules(self, layout: TokenLayout) -> tuple[TokenRule, ...]:
        """The token pairs of the formula itself, as rules whose union is the pattern."""

    def select(self, layout: TokenLayout) -> torch.Tensor:
        """Pairs of video blocks that the pattern keeps, bool [NV, NV], not cached and without the forced diagonal."""
        kept = [count_pairs(layout, rule) > 0 for rule in self.rules(layout)]
        return torch.stack(kept).any(0)

    def video_blocks(self, layout: TokenLayout) -> torch.Tensor:
        """Kept pairs of video blocks in block order, bool [NV, NV] on the CPU; the diagonal is always kept."""
        return _video_blocks(self, layout)

    def blocks(self, layout: TokenLayout) -> torch.Tensor:
        """Kept block pairs of the whole sequence, bool [NB, NB] on the CPU.

        Every query keeps every text key, and text queries keep everything.
        """
        return _all_blocks(self, layout)

    @property
    def cuts_blocks(self) -> bool:
        """Whether partly covered blocks are masked token by token instead of kept whole."""
        return False

    def token_rule(self, layout: TokenLayout) -> AxisRule | None:
        """The rule that cuts the kept blocks; ``None`` for whole blocks."""
        return None

    def mask(self, layout: TokenLayout) -> BlockMask:
        """What a kernel runs: :meth:`blocks`, with the rule over tokens where it cuts some of them; on the CPU.

        Blocks that are only kept for the diagonal and in which the rule keeps nothing are not in it.
        """
        return _mask(self, layout)

    def exact_density(self, layout: TokenLayout) -> float:
        """Share of the video's token pairs that the formula itself keeps, before rounding to blocks."""
        return _exact_pairs(self, layout) / layout.grid.tokens**2

    def density(self, layout: TokenLayout) -> float:
        """Share of the video's token pairs that the kept blocks hold; text is not counted."""
        return _kept_pairs(self, layout) / layout.grid.tokens**2

    def rounding(self, layout: TokenLayout) -> float:
        """Kept token pairs after rounding to blocks over those of the formula: at least 1 where rounding only adds."""
        return _kept_pairs(self, layout) / max(1, _exact_pairs(self, layout))

    def describe(self, layout: TokenLayout) -> str:
        """One line: name, window on this layout, and what of all token pairs stays."""
        return (
            f"{self.name}, {self.resolved(layout)}: keeps {self.exact_density(layout):.1%} of the video's token pairs,"
            f" {self.density(layout):.1%} after rounding to {layout.tile_shape} blocks (x{self.rounding(layout):.2f})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CoveragePattern(StaticPattern):
    """A pattern over tokens that may drop blocks it hardly touches.

    Args:
        min_coverage: share of a block's token pairs that the rule must exceed for the block to be kept; 0 keeps a
            block as soon as the rule keeps one of its pairs. Above 0, pairs of the rule itself may be dropped.
        min_columns: the same by whole keys, as Radial Attention counts: of the keys that any query of the block keeps,
            the share that must be exceeded by those which more than a third of its queries keep; 0 does not ask.

    Raises:
        ConfigError: unless 0 <= min_coverage < 1 and 0 <= min_columns < 1, one of them 0.
    """

    min_coverage: float = 0.0
    min_columns: float = 0.0

    def __post_init__(self) -> None:
        check_coverage(self.name, "min_coverage", self.min_coverage)
        check_coverage(self.name, "min_columns", self.min_columns)
        if self.min_coverage and self.min_columns:
            raise ConfigError(
                f"{self.name}: min_coverage is {self.min_coverage} and min_columns {self.min_columns}; a block is kept"
                " by one of them, so leave the other out"
            )

    def select(self, layout: TokenLayout) -> torch.Tensor:
        """Pairs of video blocks covered by more than is asked, bool [NV, NV]."""
        if self.min_columns:
            return self.enough_columns(*count_columns(layout, self.rules(layout)))
        if self.min_coverage == 0:
            return super().select(layout)
        pairs = count_union(layout, self.rules(layout))
        return pairs.double() > self.min_coverage * block_pair_sizes(layout).double()

    def enough_columns(self, touched: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        """Which blocks ``min_columns`` keeps, by :func:`~.pairs.count_columns`; a share that is met is not exceeded."""
        return filled.double() > self.min_columns * touched.double() + 1e-6


@lru_cache(maxsize=64)
def _video_blocks(pattern: StaticPattern, layout: TokenLayout) -> torch.Tensor:
    keep = pattern.select(layout)
    keep.fill_diagonal_(True)
    return keep


@lru_cache(maxsize=64)
def _all_blocks(pattern: StaticPattern, layout: TokenLayout) -> torch.Tensor:
    keep = torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool)
    keep[layout.video_blocks, layout.video_blocks] = pattern.video_blocks(layout)
    return keep


@lru_cache(maxsize=64)
def _mask(pattern: StaticPattern, layout: TokenLayout) -> BlockMask:
    return BlockMask.from_dense(pattern.blocks(layout), pattern.token_rule(layout))


@lru_cache(maxsize=256)
def _exact_pairs(pattern: StaticPattern, layout: TokenLayout) -> int:
    # the total does not depend on the blocks, and one block for the whole video is the cheapest to count
    whole = TokenLayout(layout.grid, TileShape(*layout.grid))
    return int(count_union(whole, pattern.rules(layout)))


@lru_cache(maxsize=256)
def _kept_pairs(pattern: StaticPattern, layout: TokenLayout) -> int:
    return int(block_pair_sizes(layout)[pattern.video_blocks(layout)].sum())
