"""Delta attention: a few queries see everything, and what changes for them is added to those around them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..kernels.dense import attention_with_lse
from ..layout import TokenLayout
from ..patterns.dynamic import Heads
from ..patterns.params import check_count, check_flag
from ..patterns.sparge import self_similarity
from .base import Call, Compensation
from .registry import register
from .rows import skipping_blocks, wide

__all__ = ["Delta"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Delta(Compensation):
    """O = O_sparse + (O_dense - O_sparse at the query's representative).

    Each block of queries is cut into ``queries`` runs of tokens; one query of each run, its representative, attends
    everything in the model's own dtype, and the difference to its sparse output is added to the whole run. Blocks that
    skip nothing are left alone. Source: delta attention takes the first of every 64 queries of a text. Different here:
    runs end with their tile, and both options below.

    Args:
        queries: runs of a block; a shorter block has one for each token at most.
        nearest: the representative is the query nearest to the mean of its run, in each head, instead of the first.
        similarity: blocks whose queries have a smaller mean cosine get no difference added, in [0, 1]; 0 adds it to
            all.

    Raises:
        ConfigError: if a parameter is out of range.
    """

    name: ClassVar[str] = "delta"

    queries: int = 1
    nearest: bool = False
    similarity: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.name, "queries", self.queries)
        check_flag(self.name, "nearest", self.nearest)
        number = isinstance(self.similarity, int | float) and not isinstance(self.similarity, bool)
        if not number or not 0 <= self.similarity <= 1:
            raise ConfigError(f"{self.name}: similarity is {self.similarity!r}; give a mean cosine from 0 to 1")

    def attend(self, call: Call) -> torch.Tensor:
        """The kernel's output with the differences added."""
        heads, layout = call.heads, call.heads.layout
        out = call.sparse()
        runs = _runs(layout, self.queries, out.device)
        picked = self.representatives(heads, runs)
        index = picked.unsqueeze(-1).expand(*picked.shape, out.shape[-1])
        q, k, v = (x.transpose(1, 2) for x in (heads.q, heads.k, heads.v))
        dense, _ = attention_with_lse(q.gather(2, index), k, v, heads.scale)
        call.add_pairs(picked.shape[-1] / layout.tokens)
        differences = wide(dense) - wide(out.transpose(1, 2).gather(2, index))
        left_alone = ~self._corrected(call)[..., runs.block]
        differences = differences.masked_fill(left_alone.unsqueeze(-1), 0.0)
        tokens = layout.video_tokens
        added = differences[:, :, runs.of_token].transpose(1, 2)
        out[:, tokens] = (wide(out[:, tokens]) + added).to(out.dtype)
        return out

    def representatives(self, heads: Heads, runs: Runs) -> torch.Tensor:
        """Positions in the sequence of the queries that see everything, int64 [B,H,R], one for each run."""
        batch, _, number, _ = heads.q.shape
        if not self.nearest:
            return runs.rows[:, 0].expand(batch, number, -1)
        layout = heads.layout
        tokens = layout.video_tokens
        q = heads.q[:, tokens].transpose(1, 2).float()
        sums = q.new_zeros(batch, number, len(runs.rows), q.shape[-1]).index_add_(2, runs.of_token, q)
        means = sums / runs.sizes[:, None]
        apart = (q - means[:, :, runs.of_token]).square().sum(-1)
        apart = apart[:, :, runs.rows - layout.video_start]
        # two tokens are equally near to their mean: of such the first, whatever the rounding
        near = apart <= apart.amin(-1, keepdim=True) * (1 + 1e-5)
        nearest = near.to(torch.uint8).argmax(-1, keepdim=True)
        return runs.rows.expand(batch, number, -1, -1).gather(-1, nearest).squeeze(-1)

    def _corrected(self, call: Call) -> torch.Tensor:
        """Blocks of queries that get a difference, bool [1 or B, 1 or H, NB]."""
        corrected = skipping_blocks(call)
        if self.similarity > 0:
            corrected = corrected & (self_similarity(call.heads.q, call.heads.layout) >= self.similarity)
        return corrected


@dataclass(frozen=True, eq=False)
class Runs:
    """The video's tokens in runs that share a difference.

    Args:
        of_token: int64 [grid tokens], the run of each video token in layout order.
        rows: int64 [R,N], positions of each run's tokens in the sequence; shorter runs repeat theirs.
        sizes: float32 [R], tokens of each run.
        block: int64 [R], the block of each run.
    """

    of_token: torch.Tensor
    rows: torch.Tensor
    sizes: torch.Tensor
    block: torch.Tensor


@lru_cache(maxsize=32)
def _runs(layout: TokenLayout, queries: int, device: torch.device) -> Runs:
    """Each video block of n tokens in c = min(queries, n) runs; the m-th begins at its token m * n // c."""
    sizes = layout.block_sizes[layout.video_blocks]
    counts = sizes.clamp(max=queries)
    block = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    number = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block]
    starts, ends = (m * sizes[block] // counts[block] for m in (number, number + 1))
    lengths = ends - starts
    first = layout.block_offsets[:-1][layout.video_blocks][block] + starts
    rows = first[:, None] + torch.arange(int(lengths.max())) % lengths[:, None]
    of_token = torch.repeat_interleave(torch.arange(len(block)), lengths)  # runs follow one another
    parts = (of_token, rows, lengths.float(), block + layout.video_blocks.start)
    return Runs(*(x.to(device) for x in parts))
