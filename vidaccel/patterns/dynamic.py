"""Patterns that look at queries and keys, and what they get to see of a call."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch

from ..blockmask import BlockMask
from ..layout import TokenLayout
from ..pooling import block_means
from ..variablemask import VariableBlockMask
from .base import Pattern

__all__ = ["DynamicPattern", "HeadOrder", "Heads", "choose_blocks"]

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """An order of the tokens for each head, other than the layout's; text stays where it is.

    Args:
        q, k: int64 [1 or B, 1 or H, S], permutations: place i of the new order takes token ``q[..., i]`` of the layout
            order. Keys and values go by ``k``.
        coords: (frame, row, column) of each video token in the new order, int64 [V,3], where queries and keys of all
            heads go by one order; ``None`` where they do not.
    """

    q: torch.Tensor
    k: torch.Tensor
    coords: torch.Tensor | None = None

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """An output [B,S,H,D] in the order of ``q``, back in layout order."""
        index = self.q.expand(out.shape[0], out.shape[2], -1).transpose(1, 2)[..., None].expand(out.shape)
        return torch.empty_like(out).scatter_(1, index, out)


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
        transformer, layer: where the call is in the pipeline.
        members: numbers of these heads in the layer, () for all in order.
        weights: trained tensors of this layer that the user gave, by name; see ``vidaccel.patch(weights=...)``.
        hidden: [B,S,C], what the layer's projections took, in layout order, zeros for text that joins the video inside
            the layer; ``None`` unless something asked for it.
        order: the order that q, k and v are in, where it is not the layout's.
        curvature: norm(v - v') / norm(v') of the last two outputs v', v of this transformer in this guidance branch;
            ``None`` before there are two, and unless the pattern asks: :attr:`DynamicPattern.needs_curvature`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    memory: dict[str, Any] = field(default_factory=dict)
    noise_level: float = 0.0
    step: int = 0
    scale: float = 0.0
    transformer: str = "transformer"
    layer: int = 0
    members: tuple[int, ...] = ()
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
    order: HeadOrder | None = None
    curvature: float | None = None

    def __post_init__(self) -> None:
        if self.scale == 0.0:
            object.__setattr__(self, "scale", 1 / math.sqrt(self.q.shape[-1]))
        if not self.members:
            object.__setattr__(self, "members", tuple(range(self.q.shape[2])))

    def only(self, which: torch.Tensor, members: tuple[int, ...] | None = None) -> Heads:
        """Some of these heads, by their places here, int64 [n], with an empty memory.

        Args:
            members: their numbers in the layer, where the caller knows them: reading ``which`` waits for the device.
        """
        q, k, v = (x.index_select(2, which) for x in (self.q, self.k, self.v))
        members = tuple(self.members[i] for i in which.tolist()) if members is None else members
        return replace(self, q=q, k=k, v=v, members=members, memory={})

    def sample(self, number: int) -> Heads:
        """One sample of the batch, with an empty memory."""
        q, k, v = (x[number : number + 1] for x in (self.q, self.k, self.v))
        hidden = None if self.hidden is None else self.hidden[number : number + 1]
        return replace(self, q=q, k=k, v=v, hidden=hidden, memory={})

    def reordered(self, order: HeadOrder) -> Heads:
        """The same call with each head's tokens in another order; ``hidden``, which all heads share, keeps its own."""

        def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            rows = x.transpose(1, 2)  # tokens of a head are to lie together
            index = index.expand(*rows.shape[:2], -1)[..., None]
            return rows.gather(2, index.expand(rows.shape)).transpose(1, 2)

        q, k, v = take(self.q, order.q), take(self.k, order.k), take(self.v, order.k)
        return replace(self, q=q, k=k, v=v, order=order)

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
    #: Whether the choice depends on earlier calls, by way of ``heads.memory``.
    stateful: ClassVar[bool] = False
    #: What :meth:`choose` assumes of where blocks lie: ``"nothing"``, so that any tokens may fill them; ``"order"``,
    #: that queries and keys are in one order whose coordinates ``heads.order`` knows; ``"tiles"``, that they are tiles.
    places: ClassVar[Literal["nothing", "order", "tiles"]] = "tiles"
    #: Whether :meth:`order` depends on queries and keys, so that a place holds another token in the next call.
    sorts_by_content: ClassVar[bool] = False
    #: Whether it reads ``heads.curvature``, for which the transformer's outputs are kept from step to step.
    needs_curvature: ClassVar[bool] = False

    @abstractmethod
    def choose(self, heads: Heads) -> torch.Tensor:
        """Pairs of video blocks to keep, bool [B,H,NV,NV] on the device of q. Rows may come out empty."""

    def order(self, heads: Heads) -> HeadOrder | None:
        """An order of its own for each head's tokens, or ``None`` for the layout's.

        It is asked before :meth:`choose`, which then sees the heads in that order; their blocks are the layout's,
        filled with other tokens.
        """
        return None

    def mask(self, heads: Heads) -> BlockMask | VariableBlockMask:
        """What a kernel gets: the blocks to keep, text included, for heads in the order of :meth:`order`."""
        return BlockMask.from_dense(choose_blocks(self, heads))

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
