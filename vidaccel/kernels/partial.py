"""Partial blocks of the gather path: key blocks of which a rule over tokens keeps only some pairs.

Each query block gathers the key blocks that its rule cuts, scores them all, and masks what the rule drops::

    k_i, v_i [n,c*T,D] = gather(k, v)                     the c partial key blocks of n query blocks
    o_i, lse_i         = softmax(q_i k_i^T + bias) v_i    0 for kept pairs, -inf for the others
    o, lse             = merge((o, lse), (o_i, lse_i))

Blocks are gathered as whole tiles of T slots, so that all have one size; the slots that a tile at the edge of the grid
lacks are masked as well. Tiles far apart are cut alike, so the masks of all pairs are a few distinct ones [T,T].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from ..axisrule import AxisRule
from ..blockmask import BlockMask
from ..layout import TokenLayout
from ..pooling import log_block_sizes

__all__ = ["PartialGroup", "PartialPlan", "masked_attention", "partial_plan"]


@dataclass(frozen=True, eq=False)
class PartialGroup:
    """Query blocks of one head that have the same number c of partial key blocks.

    Args:
        q_blocks: int64 [n].
        k_blocks: int64 [n,c].
        masks: int64 [n,c], which of the distinct masks cuts each pair.
    """

    q_blocks: torch.Tensor
    k_blocks: torch.Tensor
    masks: torch.Tensor


@dataclass(frozen=True, eq=False)
class PartialPlan:
    """The partial blocks of one mask.

    Args:
        slots: int64 [NB,T], position of each slot's token; that of the block's first one where a block has no token.
        filled: bool [NB,T], slots with a token.
        bias: float32 [U,T,T], the distinct masks: 0 where a pair is kept, -inf elsewhere.
        alive: bool [U,T], rows of each mask that keep a key.
        groups: of each batch entry and head of the mask.
        skipped: bool [B,H,NB,NB], pairs that are neither kept nor partial.
        tail_bias: float32 [B,H,NB,NB], log n_j for skipped blocks j and -inf for the others.
    """

    slots: torch.Tensor
    filled: torch.Tensor
    bias: torch.Tensor
    alive: torch.Tensor
    groups: tuple[tuple[tuple[PartialGroup, ...], ...], ...]
    skipped: torch.Tensor
    tail_bias: torch.Tensor


#: Static masks serve in every layer and step; the entry goes when the mask goes.
_CACHE: WeakKeyDictionary[BlockMask, dict[tuple[TokenLayout, torch.device], PartialPlan]] = WeakKeyDictionary()


def partial_plan(mask: BlockMask, rule: AxisRule, layout: TokenLayout, device: torch.device) -> PartialPlan:
    """The cached plan of a mask with this rule, with its tensors on ``device``."""
    known = _CACHE.setdefault(mask, {})
    key = (layout, device)
    if key not in known:
        # tensors made under inference_mode could not be used outside it, and the cache outlives the block
        with torch.inference_mode(False):
            known[key] = _build(mask, rule, layout, device)
    return known[key]


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, alive: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v over the kept pairs only.

    Args:
        q: float32 [n,T,D].
        k, v: float32 [n,L,D].
        bias: float32 [n,T,L], 0 where a pair is kept and -inf elsewhere.
        alive: bool [n,T], rows that keep a pair.
        scale: multiplies q k^T.

    Returns:
        The output [n,T,D] and the LSE [n,T]: zeros and -inf for rows that keep nothing.
    """
    if q.device.type == "cpu":  # as fast with a bias of its own dtype as without one
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = (
            x.squeeze(1) for x in flash(*(x.unsqueeze(1) for x in (q, k, v)), attn_mask=bias[:, None], scale=scale)
        )
    else:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
        lse = scores.logsumexp(-1)
        out = torch.bmm((scores - lse.unsqueeze(-1)).exp(), v)
    # what comes out of a softmax over nothing is the implementation's own affair
    return out.masked_fill_(~alive.unsqueeze(-1), 0.0), lse.masked_fill_(~alive, -math.inf)


def _build(mask: BlockMask, rule: AxisRule, layout: TokenLayout, device: torch.device) -> PartialPlan:
    slots, filled = _slots(layout)
    partial = mask.partial.cpu()
    which, parts = _distinct(rule, layout)
    first = layout.video_blocks.start
    groups, used = [], []
    for entry in partial:
        heads = []
        for h, cut in enumerate(entry):
            counts = cut.sum(-1)
            found = []
            for count in counts[counts > 0].unique().tolist():
                q_blocks = (counts == count).nonzero().squeeze(-1)
                k_blocks = cut[q_blocks].nonzero()[:, 1].view(-1, count)
                found.append((q_blocks, k_blocks))
                used.append(which[h if rule.heads > 1 else 0][q_blocks[:, None] - first, k_blocks - first].reshape(-1))
            heads.append(found)
        groups.append(heads)
    kinds, position = torch.unique(torch.cat(used), return_inverse=True)
    masks = iter(position.split([len(numbers) for numbers in used]))  # in the order of the groups below
    skipped = ~mask.dense
    tail_bias = torch.where(skipped.to(device), log_block_sizes(layout, device), -math.inf)
    keep = _outer(kinds, parts).to(device)
    return PartialPlan(
        slots.to(device),
        filled.to(device),
        torch.zeros(keep.shape, device=device).masked_fill_(~keep, -math.inf),
        keep.any(-1),
        tuple(
            tuple(
                tuple(PartialGroup(q.to(device), k.to(device), next(masks).view(k.shape).to(device)) for q, k in found)
                for found in heads
            )
            for heads in groups
        ),
        skipped.to(device),
        tail_bias,
    )


def _slots(layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Position of the token in each slot of each block, and whether there is one: [NB,T]."""
    tile, start = layout.tile_shape, layout.block_offsets[:-1, None]
    slot = torch.arange(tile.tokens)
    rank = slot.repeat(layout.num_blocks, 1)
    filled = rank < layout.block_sizes[:, None]
    # tiles at the edges are shorter boxes: slot (f, h, w) of the tile is their token (f * height + h) * width + w
    f, h, w = slot // (tile.height * tile.width), slot // tile.width % tile.height, slot % tile.width
    sizes = zip(layout.axis_sizes, layout.block_coords.unbind(-1), strict=True)
    frames, height, width = (extents[tiles][:, None] for extents, tiles in sizes)
    rank[layout.video_blocks] = (f * height + h) * width + w
    filled[layout.video_blocks] = (f < frames) & (h < height) & (w < width)
    return start + rank * filled, filled


def _distinct(rule: AxisRule, layout: TokenLayout) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Number of the mask of each pair of video blocks, int64 [R,NV,NV], and the distinct masks of each axis [U,t,t].

    A number is that of the frames' mask, the rows' and the columns', written in a mixed base.
    """
    number = torch.zeros((), dtype=torch.int64)
    parts = []
    for matrix, tile, count, coord in zip(
        rule.axes, layout.tile_shape, layout.tile_counts, layout.block_coords.unbind(-1), strict=True
    ):
        extent = tile * count - matrix.shape[-1]
        whole = torch.nn.functional.pad(matrix, (0, extent, 0, extent))
        pairs = whole.view(-1, count, tile, count, tile).transpose(2, 3)
        masks, ids = torch.unique(pairs.reshape(-1, tile * tile), dim=0, return_inverse=True)
        ids = ids.view(rule.heads, count, count)
        number = number * len(masks) + ids[:, coord][:, :, coord]
        parts.append(masks.view(-1, tile, tile))
    return number, parts


def _outer(numbers: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """The masks of these numbers, bool [U,T,T]: products of the axes' masks."""
    frames, rows, columns = parts
    rest, w = numbers // len(columns), numbers % len(columns)
    f, h = rest // len(rows), rest % len(rows)
    kept = (
        frames[f][:, :, None, None, :, None, None]
        & rows[h][:, None, :, None, None, :, None]
        & columns[w][:, None, None, :, None, None, :]
    )
    size = math.prod(part.shape[-1] for part in parts)
    return kept.reshape(-1, size, size)
