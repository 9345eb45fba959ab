"""Context parallelism: every rank holds a part of the tokens, and computes some heads over all of them.

diffusers splits the tokens of the block stack over the ranks. Before a sparse call they are exchanged for heads, so
that a rank has the whole sequence of its heads, runs their part of the plan, and sends back what belongs to the others:
the exchange of DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509). Where diffusers is asked for a ring, sparse calls
exchange heads all the same: rotated keys would have to pass every rank, also those whose queries skip them. Calls that
the plan wants dense stay diffusers' own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..errors import PatchError
from ..types import VideoGrid
from .attend import attend
from .context import ForwardContext
from .prepare import HeadShare
from .site import AttentionSite, LayerCall

__all__ = ["Ranks", "attend_across", "ranks_of"]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share a sequence, in the order of their tokens.

    Args:
        group: their process group.
        rank: the place of this one in it.
        count: how many they are.
        ulysses: how many of them exchange heads in diffusers' own calls; 1 for a ring alone.
        uneven: whether tokens and heads may be split into parts that are not equal.
    """

    group: Any
    rank: int
    count: int
    ulysses: int
    uneven: bool

    def shares(self, heads: int) -> list[HeadShare]:
        """Which heads of a layer each rank computes; the first ranks have one more where they do not divide.

        Raises:
            PatchError: if diffusers would not split them, or a rank would have none.
        """
        if heads % self.ulysses and not self.uneven:
            raise PatchError(
                f"{heads} heads cannot be split over ulysses_degree={self.ulysses}; give a degree that divides them, or"
                " ulysses_anything=True where diffusers has it"
            )
        if heads < self.count:
            raise PatchError(
                f"{heads} heads cannot be split over {self.count} ranks; use as many ranks as heads at most"
            )
        edges = _edges(heads, self.count)
        return [HeadShare(start, stop - start, heads) for start, stop in pairwise(edges)]

    def tokens(self, mine: int, device: torch.device) -> list[int]:
        """How many tokens each rank holds, where this one has ``mine``; asks the others if parts may be unequal."""
        if not self.uneven:
            return [mine] * self.count
        sent = torch.full((self.count,), mine, dtype=torch.int64, device=device)
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=self.group)
        return [int(count) for count in received.tolist()]

    def to_heads(self, x: torch.Tensor, shares: Sequence[HeadShare], tokens: Sequence[int]) -> torch.Tensor:
        """[B, this rank's tokens, all heads, D] -> [B, all tokens, this rank's heads, D]."""
        batch, _, _, dim = x.shape
        mine = shares[self.rank].count
        sent = [x[:, :, share.first : share.first + share.count] for share in shares]
        return torch.cat(self._exchange(sent, [(batch, part, mine, dim) for part in tokens]), dim=1)

    def to_tokens(self, x: torch.Tensor, shares: Sequence[HeadShare], tokens: Sequence[int]) -> torch.Tensor:
        """The way back."""
        batch, _, _, dim = x.shape
        sent = list(x.split(list(tokens), dim=1))
        shapes = [(batch, tokens[self.rank], share.count, dim) for share in shares]
        return torch.cat(self._exchange(sent, shapes), dim=2)

    def gather(self, x: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """[B, this rank's tokens, C] -> [B, all tokens, C]."""
        shapes = [(x.shape[0], part, x.shape[2]) for part in tokens]
        return torch.cat(self._exchange([x] * self.count, shapes), dim=1)

    def _exchange(self, parts: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Sends each rank its part and returns what each of them sent, whose shapes are known."""
        sent = torch.cat([part.reshape(-1) for part in parts])
        sizes = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        torch.distributed.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=self.group)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def ranks_of(parallel: Any) -> Ranks | str:
    """The ranks of a model's diffusers ``ParallelConfig``, or one sentence on why it cannot run sparse with them."""
    context = getattr(parallel, "context_parallel_config", None)
    if getattr(parallel, "tensor_parallel_config", None) is not None or context is None:
        return "the model runs under a parallelism that splits something else than tokens; use context parallelism"
    mesh = getattr(context, "_flattened_mesh", None)
    if mesh is None:
        return "the model's context parallelism has no mesh of ranks in a form known here"
    group = mesh.get_group()
    return Ranks(
        group,
        torch.distributed.get_rank(group),
        torch.distributed.get_world_size(group),
        context.ulysses_degree,
        bool(getattr(context, "ulysses_anything", False) or getattr(context, "ring_anything", False)),
    )


def attend_across(
    site: AttentionSite,
    context: ForwardContext,
    ranks: Ranks,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`~.attend.attend` for this rank's tokens [B, S, H, D]; every rank must call it at the same place.

    What decides is the same on all ranks, so none waits for an exchange that another leaves out.

    Args:
        context: the forward pass that the call is in.

    Raises:
        PatchError: if the layer's heads cannot be split over the ranks.
        StrictError: as there.
    """
    planned = site.session.policy(context.moment, site.transformer.name, site.layer)
    if context.grid is None or planned.is_dense:
        return attend(site, q, k, v, mask, hidden)
    with site.stats.timer.running(q.device):
        shares = ranks.shares(q.shape[2])
        tokens = ranks.tokens(q.shape[1], q.device)
        reason = _why_not(sum(tokens), context.grid, mask)
        if reason is not None:
            site.fell_back(reason)
            site.stats.count("dense", 1.0, sparse=False)
            return LayerCall(site, context).run_dense(q, k, v, mask)
        if hidden is not None and hidden.shape[1] == q.shape[1]:
            hidden = ranks.gather(hidden, tokens)
        q, k, v = (ranks.to_heads(x, shares, tokens) for x in (q, k, v))
    out = attend(site, q, k, v, None, hidden, shares[ranks.rank])
    with site.stats.timer.running(out.device):
        return ranks.to_tokens(out, shares, tokens)


def _why_not(tokens: int, grid: VideoGrid, mask: torch.Tensor | None) -> str | None:
    """Why the parts of a sequence of so many tokens cannot be put together, or ``None``."""
    if mask is not None:
        return "the model masks tokens of a sequence that ranks share, and the mask is not exchanged"
    if tokens != grid.tokens:  # text and video are tensors of their own, and each is split for itself
        return (
            f"ranks share {tokens} tokens where the grid {grid} has {grid.tokens}; the order of the others is unknown"
        )
    return None


def _edges(whole: int, parts: int) -> list[int]:
    """Where parts begin and end that differ by one at most, the longer ones first."""
    size, more = divmod(whole, parts)
    return [part * size + min(part, more) for part in range(parts + 1)]
