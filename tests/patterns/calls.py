"""Calls for the dynamic patterns' tests, and the promises that every one of them keeps.

An oracle gets one head of one sample as plain float64 arrays, with lists of token numbers for the blocks, and says by
loops which pairs of video blocks the published formula keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from tests.cases import token_mask
from vidaccel.blockmask import BlockMask
from vidaccel.kernels import reference
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, Heads, choose_blocks
from vidaccel.types import TileShape, VideoGrid

Array = npt.NDArray[np.float64]

__all__ = ["LAYOUTS", "Head", "Oracle", "keeps_its_promises", "make_call", "softmax"]

#: Ragged along every axis, without text, with text behind and before it.
LAYOUTS = [
    TokenLayout.of(VideoGrid(5, 7, 9), TileShape(2, 4, 4)),
    TokenLayout.of(VideoGrid(5, 7, 9), TileShape(2, 4, 4), text_tokens=11),
    TokenLayout.of(VideoGrid(5, 7, 9), TileShape(2, 4, 4), text_tokens=37, text_first=True),
]


@dataclass(frozen=True, eq=False)
class Head:
    """One head of one sample, as oracles see it.

    Args:
        q, k, v: [S, D], in layout order.
        blocks: token numbers of each block.
        video: numbers of the video blocks, in order.
        text: numbers of the text blocks.
        tiles: (t, h, w) tile index of each video block.
        layout: for what is static; oracles use it for grid and tile only.
    """

    q: Array
    k: Array
    v: Array
    blocks: list[list[int]]
    video: list[int]
    text: list[int]
    tiles: list[tuple[int, int, int]]
    layout: TokenLayout

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(self.q.shape[1])

    def mean(self, x: Array, block: int) -> Array:
        """Mean of a block's tokens, [D]."""
        return np.asarray(x[self.blocks[block]].mean(0))

    @cached_property
    def k_means(self) -> list[Array]:
        """Mean key of each block."""
        return [self.mean(self.k, j) for j in range(len(self.blocks))]

    def pooled(self, i: int) -> Array:
        """softmax over all blocks j of scale * mean q_i . mean k_j + log n_j, [NB]."""
        query = self.mean(self.q, i)
        logits = [
            self.scale * float(query @ self.k_means[j]) + math.log(len(tokens)) for j, tokens in enumerate(self.blocks)
        ]
        return softmax(np.array(logits))


Oracle = Callable[[Head], list[list[bool]]]


def softmax(x: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def make_call(layout: TokenLayout, *, batch: int = 2, heads: int = 3, dim: int = 16, seed: int = 0) -> Heads:
    """q, k, v with structure from block to block, as views of tensors in another order of axes."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(strength: float) -> torch.Tensor:
        shape = (batch, heads, layout.tokens, dim)
        tokens = torch.randn(shape, generator=generator)
        blocks = torch.randn((batch, heads, layout.num_blocks, dim), generator=generator)
        # float32 numbers in float64: what is rounded to float32 on the way loses nothing
        return (tokens + strength * blocks[:, :, layout.block_of_token]).double().transpose(1, 2)

    q, k, v = tensor(1.5), tensor(1.5), tensor(0.5)
    return Heads(q, k, v, layout, {}, noise_level=0.5, step=3)


def heads_of(call: Heads) -> list[list[Head]]:
    """Every sample's heads for the oracle."""
    layout = call.layout
    edges = layout.block_offsets.tolist()
    blocks = [list(range(a, b)) for a, b in pairwise(edges)]
    numbers = list(range(len(blocks)))
    tiles = [(t, h, w) for t, h, w in layout.block_coords.tolist()]
    found = []
    for b in range(call.q.shape[0]):
        sample = []
        for h in range(call.q.shape[2]):
            q, k, v = (x[b, :, h].double().numpy() for x in (call.q, call.k, call.v))
            sample.append(
                Head(q, k, v, blocks, numbers[layout.video_blocks], numbers[layout.text_blocks], tiles, layout)
            )
        found.append(sample)
    return found


def expected(oracle: Oracle, call: Heads) -> torch.Tensor:
    """The oracle's pairs of video blocks for every sample and head, bool [B,H,NV,NV]."""
    return torch.tensor([[oracle(head) for head in sample] for sample in heads_of(call)])


def keeps_its_promises(pattern: DynamicPattern, oracle: Oracle, *, seed: int = 0) -> None:
    """The oracle's blocks on every layout; samples and heads on their own; and a kernel that attends what is kept."""
    for layout in LAYOUTS:
        call = make_call(layout, seed=seed)
        assert not call.q.is_contiguous()
        kept = pattern.choose(call)
        assert kept.dtype == torch.bool and kept.shape == (2, 3, layout.num_video_blocks, layout.num_video_blocks)
        assert torch.equal(kept, expected(oracle, call)), f"{pattern} on {layout}"
        assert not bool(kept.all()) and bool(kept.any())
        assert not torch.equal(kept[0], kept[1]), "samples have masks of their own"
        _alone_as_together(pattern, call, kept)
        _attends(pattern, call)


def _alone_as_together(pattern: DynamicPattern, call: Heads, kept: torch.Tensor) -> None:
    """Each sample alone, heads in another order, and contiguous tensors give the same blocks."""

    def again(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pattern.choose(replace(call, q=q, k=k, v=v, memory={}))

    for b in range(2):
        assert torch.equal(again(*(x[b : b + 1] for x in (call.q, call.k, call.v))), kept[b : b + 1])
    order = torch.tensor([2, 0, 1])
    assert torch.equal(again(*(x[:, :, order] for x in (call.q, call.k, call.v))), kept[:, order])
    assert torch.equal(again(*(x.contiguous() for x in (call.q, call.k, call.v))), kept)


def _attends(pattern: DynamicPattern, call: Heads) -> None:
    """The reference kernel with the chosen mask is softmax attention over the kept tokens; text is always kept."""
    layout = call.layout
    blocks = choose_blocks(pattern, replace(call, memory={}))
    assert bool(blocks[:, :, layout.text_blocks].all()) and bool(blocks[..., layout.text_blocks].all())
    out = reference.block_sparse_attention(call.q, call.k, call.v, layout, BlockMask.from_dense(blocks))
    assert isinstance(out, torch.Tensor)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    scores = (q @ k.mT * call.scale).masked_fill(~token_mask(layout, blocks), -math.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), rtol=1e-10, atol=1e-10)
