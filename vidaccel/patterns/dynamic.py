"""Patterns that look at queries and keys, and what they get to see of a call."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch

from ..layout import TokenLayout
from ..pooling import block_means
from .base import Pattern

__all__ = ["DynamicPattern", "Heads", "choose_blocks"]

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Heads:
    """Some heads of one attention call, as a dynamic pattern sees them. All heads here follow the same pattern.

    Args:
        q, k, v: [B,S,H,D] in layout order, after norms and RoPE, any strides.
        layout: their tokens' order and blocks.
        memory: whatever the pattern wants to find again in the next call of the same layer, heads and guidance branch.
            Empty at the start of each generation.
        noise_level: 1 is pure noise, 0 is clean.
        step: denoising step, counted from 0.
        scale: multiplies q k^T.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    memory: dict[str, Any] = field(default_factory=dict)
    noise_level: float = 0.0
    step: int = 0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.scale == 0.0:
            object.__setattr__(self, "scale", 1 / math.sqrt(self.q.shape[-1]))

    @cached_property
    def q_means(self) -> torch.Tensor:
        """Mean query of each block, text blocks included, float32 [B,H,NB,D]."""
        return self._means(self.q)

    @cached_property
    def k_means(self) -> torch.Tensor:
        """Mean key of each block, float32 [B,H,NB,D]."""
        return self._means(self.k)

    @cached_property
    def v_means(self) -> torch.Tensor:
        """Mean value of each block, float32 [B,H,NB,D]."""
        return self._means(self.v)

    @cached_property
    def sizes(self) -> torch.Tensor:
        """Tokens of each block, float32 [NB] on the device of q."""
        return self.layout.block_sizes.to(device=self.q.device, dtype=torch.float32)

    @cached_property
    def pooled_logits(self) -> torch.Tensor:
        """scale * mean query . mean key of every pair of blocks, text included, float32 [B,H,NB,NB]."""
        return torch.einsum("bhid,bhjd->bhij", self.q_means * self.scale, self.k_means)

    def once(self, name: str, compute: Callable[[], _T]) -> _T:
        """What ``compute`` gives, computed once for this call; patterns that differ in a density alone share it."""
        if name not in self._found:
            self._found[name] = compute()
        return self._found[name]  # type: ignore[no-any-return]

    @cached_property
    def _found(self) -> dict[str, Any]:
        return {}

    def _means(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h, d = x.shape
        return block_means(x.transpose(1, 2).reshape(b * h, s, d), self.layout).view(b, h, -1, d)


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicPattern(Pattern):
    """A rule that chooses the blocks of each call from its queries and keys.

    A subclass gives :attr:`name`, :meth:`choose` and :meth:`resolved`, and :meth:`density` if it aims at one.
    """

    dynamic: ClassVar[bool] = True

    @abstractmethod
    def choose(self, heads: Heads) -> torch.Tensor:
        """Pairs of video blocks to keep, bool [B,H,NV,NV] on the device of q. Rows may come out empty."""

    def density(self, layout: TokenLayout) -> float | None:
        """The share of token pairs that the pattern aims at, or ``None`` if it depends on the input."""
        return None

    def describe(self, layout: TokenLayout) -> str:
        """Name, parameters, and that the blocks are chosen in each call."""
        aim = self.density(layout)
        kept = "as many as the input needs" if aim is None else f"{aim:.1%} of the video's token pairs"
        return f"{self.name}, {self.resolved(layout)}: chooses blocks in each call, keeps {kept}"


def choose_blocks(pattern: DynamicPattern, heads: Heads) -> torch.Tensor:
    """Kept pairs of all blocks, bool [B,H,NB,NB].

    Every query keeps every text key, and text queries keep everything. A row of video blocks that the pattern left
    empty keeps its own block.
    """
    layout = heads.layout
    video = pattern.choose(heads)
    empty = ~video.any(-1, keepdim=True)
    own = torch.eye(video.shape[-1], dtype=torch.bool, device=video.device)
    video = video | (empty & own)
    if not layout.num_text_blocks:
        return video
    keep = torch.ones(*video.shape[:2], layout.num_blocks, layout.num_blocks, dtype=torch.bool, device=video.device)
    keep[:, :, layout.video_blocks, layout.video_blocks] = video
    return keep
