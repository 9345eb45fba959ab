"""What the kernel's programs do: a block mask cut into the pieces that fit a kernel's tile sizes.

One program computes one piece of one query block of one head. Its key list names *key pieces*: pieces of key blocks
and, with the pooled tail, pieces of the sequence of block means, which follows the keys. A block of at most
``BLOCK_N`` tokens is one piece, so in the usual case the lists are those of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from ...blockmask import BlockMask
from ...layout import TokenLayout
from .ruletables import RuleTables, rule_tables

__all__ = ["ALIGNMENT", "Pieces", "WorkList", "aligned_offsets", "worklist"]

#: In transposed fp8 V every block starts at a multiple of this many columns: 16 bytes, what a descriptor can address.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Pieces:
    """Row ranges that the kernel treats as one, int32 [N] each.

    Args:
        start: first row of each piece.
        length: rows of each piece.
        block: block that each piece belongs to; block means count as block NB.
    """

    start: torch.Tensor
    length: torch.Tensor
    block: torch.Tensor

    @staticmethod
    def of(offsets: torch.Tensor, most: int) -> Pieces:
        """Cuts the ranges between ``offsets`` int64 [NB + 1] into pieces of at most ``most`` rows."""
        sizes = offsets.diff()
        counts = (sizes + most - 1) // most
        block = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        rank = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block]
        start = offsets[:-1][block] + rank * most
        return Pieces(start, torch.minimum(offsets[1:][block] - start, torch.tensor(most)), block)

    def __len__(self) -> int:
        return len(self.start)

    def to(self, device: torch.device) -> Pieces:
        """The same pieces as the kernel reads them: int32 on its device."""
        return Pieces(*(x.to(device=device, dtype=torch.int32) for x in (self.start, self.length, self.block)))


@dataclass(frozen=True, eq=False)
class WorkList:
    """Work of one mask for one pair of tile sizes; all tensors int32 on the mask's device unless said otherwise.

    Lists broadcast over batch and heads like the mask they come from: B' and H' are 1 or B and H.

    Args:
        q: the NQ query pieces, of 1 to ``BLOCK_M`` rows.
        k: the NK key pieces and NT pieces of means, of 1 to ``BLOCK_N`` rows; means sit in rows S to S + NB.
        k_aligned: [NK + NT], first column of each key piece where blocks are aligned (:func:`aligned_offsets`).
        exact: NK.
        kv_num: [B', H', NQ], pieces in each list.
        kv_index: [B', H', NQ, NK + NT], the lists, exact pieces first. Piece i of a partial block is written as -1 - i.
        order: [B * H * NQ], all programs, the longest lists first; (b * H + h) * NQ + i is piece i of head h.
        bias: float32 [B' * H' * NB + 1, NT * BLOCK_N] or ``None``, in base-2 units: log2 of a skipped block's
            tokens, -inf for a kept one; the last row is zero, for exact pieces.
        ragged: whether some key piece is shorter than ``BLOCK_N``, so that the kernel has to mask.
        rule: what cuts the partial blocks, ``None`` if there are none.
    """

    q: Pieces
    k: Pieces
    k_aligned: torch.Tensor
    exact: int
    kv_num: torch.Tensor
    kv_index: torch.Tensor
    order: torch.Tensor
    bias: torch.Tensor | None
    ragged: bool
    rule: RuleTables | None


#: Static masks serve in every layer and step, so each is cut once; the entry goes when the mask goes.
_CACHE: WeakKeyDictionary[BlockMask, dict[tuple[object, ...], WorkList]] = WeakKeyDictionary()


def aligned_offsets(layout: TokenLayout) -> torch.Tensor:
    """First column of each block, of the block means and, last, the end, when each starts at a multiple of
    :data:`ALIGNMENT`: int64 [NB + 2] on the CPU."""
    sizes = torch.cat([layout.block_sizes, torch.tensor([layout.num_blocks])])
    room = (sizes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return torch.cat([torch.zeros(1, dtype=torch.int64), room.cumsum(0)])


def worklist(
    mask: BlockMask, layout: TokenLayout, batch: int, heads: int, block_m: int, block_n: int, *, tail: bool
) -> WorkList:
    """The cached work list of a mask for ``batch`` x ``heads``, query pieces of ``block_m`` and key pieces of
    ``block_n`` rows."""
    known = _CACHE.setdefault(mask, {})
    key = (layout, batch, heads, block_m, block_n, tail)
    if key not in known:
        # tensors made under inference_mode could not be used outside it, and the cache outlives the block
        with torch.inference_mode(False):
            known[key] = _build(mask, layout, batch, heads, block_m, block_n, tail)
    return known[key]


def _build(
    mask: BlockMask, layout: TokenLayout, batch: int, heads: int, block_m: int, block_n: int, tail: bool
) -> WorkList:
    device = mask.device
    q, k = Pieces.of(layout.block_offsets, block_m), Pieces.of(layout.block_offsets, block_n)
    q_block = q.block.to(device)
    exact = len(k)
    keep = mask.dense
    lists = keep[:, :, q_block][..., k.block.to(device)]
    bias = None
    if tail:
        means = Pieces.of(torch.tensor([layout.tokens, layout.tokens + layout.num_blocks]), block_n)
        bias = _tail_bias(keep, layout, len(means) * block_n)
        # a piece of means is on a list if one of its blocks is skipped; a full row has none and pays nothing
        wanted = torch.isfinite(bias[:-1]).reshape(*keep.shape[:3], -1, block_n).any(-1)
        lists = torch.cat([lists, wanted[:, :, q_block]], dim=-1)
        k = Pieces(
            torch.cat([k.start, means.start]),
            torch.cat([k.length, means.length]),
            torch.cat([k.block, means.block + layout.num_blocks]),
        )
    offsets = torch.cat([layout.block_offsets[:-1], torch.tensor([layout.tokens])])
    k_aligned = aligned_offsets(layout)[k.block] + k.start - offsets[k.block]
    cut = BlockMask.from_dense(lists)
    kv_index = cut.kv_indices
    if mask.rule is not None:
        partial = mask.partial[:, :, q_block][..., k.block[:exact].to(device)]
        partial = torch.nn.functional.pad(partial, (0, len(k) - exact))  # means are never cut
        kv_index = torch.where(partial.gather(-1, kv_index.long()), -1 - kv_index, kv_index)
    # stable: programs of equal length stay together by head, which shares keys in the cache
    order = cut.kv_num_blocks.expand(batch, heads, -1).flatten().argsort(descending=True, stable=True)
    return WorkList(
        q=q.to(device),
        k=k.to(device),
        k_aligned=k_aligned.to(device=device, dtype=torch.int32),
        exact=exact,
        kv_num=cut.kv_num_blocks,
        kv_index=kv_index,
        order=order.to(torch.int32),
        bias=bias,
        ragged=bool((k.length < block_n).any()),
        rule=None if mask.rule is None else rule_tables(mask.rule, device),
    )


def _tail_bias(keep: torch.Tensor, layout: TokenLayout, columns: int) -> torch.Tensor:
    """log2 n_j of skipped blocks j and -inf elsewhere, one row per query block of each head, then a row of zeros."""
    rows = keep.reshape(-1, layout.num_blocks)
    bias = torch.full((len(rows) + 1, columns), -torch.inf, device=keep.device)
    sizes = layout.block_sizes.to(device=keep.device, dtype=torch.float32).log2()
    bias[:-1, : layout.num_blocks] = torch.where(rows, -torch.inf, sizes)
    bias[-1] = 0.0
    return bias
