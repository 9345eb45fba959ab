"""What the gather path gathers: the work of one mask, sorted so that nothing needs padding.

Rows (query blocks) of one head that keep the same key blocks become one *item*: they share one gather and form one
longer query. Items with the same number of query tokens and of key tokens, of whatever head, form a *group* and can
be stacked into one batch as they are. A dense head, or the text queries of a sparse one, is one item that keeps
every key and needs no gather at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..blockmask import BlockMask
from ..layout import TokenLayout

__all__ = ["Group", "Schedule", "schedule"]


@dataclass(frozen=True)
class Group:
    """Items of one size.

    Args:
        queries: query tokens of each item.
        keys: key tokens of each item.
        full: whether the items keep every key block.
        heads: the mask head of each item, ascending.
        q_rows: query blocks of all items, one item after the other; block j of mask head h is h * NB + j.
        q_starts: where each item's query blocks start in ``q_rows``, and the end.
        kv_rows: likewise the key blocks.
        kv_starts: likewise.
    """

    queries: int
    keys: int
    full: bool
    heads: tuple[int, ...]
    q_rows: torch.Tensor
    q_starts: tuple[int, ...]
    kv_rows: torch.Tensor
    kv_starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.heads)

    def runs(self, items: range) -> Iterator[range]:
        """Cuts these items where the next one's head is not the next head: within a run keys are one slice."""
        start = items.start
        for i in items:
            if i + 1 == items.stop or self.heads[i + 1] != self.heads[i] + 1:
                yield range(start, i + 1)
                start = i + 1


@dataclass(frozen=True)
class Schedule:
    """The groups of each batch entry of a mask, and where each block lies.

    Args:
        groups: one tuple of groups per batch entry of the mask; equal entries share one.
        shared: whether the mask has one head that stands for all.
        starts: first token of each block of each mask head, int64 [mask heads * NB].
        sizes: tokens of each block, int64 [mask heads * NB].
    """

    groups: tuple[tuple[Group, ...], ...]
    shared: bool
    starts: torch.Tensor
    sizes: torch.Tensor

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Token positions of these blocks, in their order: int64, counting S tokens per mask head."""
        sizes = self.sizes.index_select(0, rows)
        ends = sizes.cumsum(0)
        # position = start of its block + its rank within it, and rank = global rank - tokens of the blocks before
        shift = self.starts.index_select(0, rows) - (ends - sizes)
        shift = shift.repeat_interleave(sizes)
        return shift + torch.arange(shift.numel(), device=rows.device)


#: Static masks are used in every layer and step, so each is sorted once; the entry goes when the mask goes.
_CACHE: WeakKeyDictionary[BlockMask, dict[tuple[TokenLayout, torch.device], Schedule]] = WeakKeyDictionary()


def schedule(mask: BlockMask, layout: TokenLayout, device: torch.device) -> Schedule:
    """The cached schedule of a mask, with its index tensors on ``device``."""
    known = _CACHE.setdefault(mask, {})
    key = (layout, device)
    if key not in known:
        # tensors made under inference_mode could not be used outside it, and the cache outlives the block
        with torch.inference_mode(False):
            known[key] = _build(mask, layout, device)
    return known[key]


@dataclass(frozen=True)
class _Items:
    """The items of one mask head: queries/keys in tokens, q_blocks/kv_blocks as block numbers of each item."""

    queries: np.ndarray
    keys: np.ndarray
    q_blocks: list[np.ndarray]
    kv_blocks: list[np.ndarray]


def _build(mask: BlockMask, layout: TokenLayout, device: torch.device) -> Schedule:
    # blocks that a rule cuts are not gathered whole (partial.py); rows with no others have no item
    keep = (mask.dense & ~mask.partial).cpu().numpy()
    batch, heads, num_blocks, _ = keep.shape
    sizes = layout.block_sizes.numpy()
    packed = np.packbits(keep, axis=-1)
    items: dict[bytes, _Items] = {}  # by content: heads and batch entries with equal lists are sorted once
    built: dict[tuple[bytes, ...], tuple[Group, ...]] = {}
    groups = []
    for b in range(batch):
        contents = tuple(packed[b, h].tobytes() for h in range(heads))
        for h, content in enumerate(contents):
            if content not in items:
                items[content] = _items(keep[b, h], packed[b, h], sizes)
        if contents not in built:
            built[contents] = _groups([items[c] for c in contents], num_blocks, device)
        groups.append(built[contents])
    head = torch.arange(heads)[:, None]
    starts = (head * layout.tokens + layout.block_offsets[:-1]).reshape(-1).to(device)
    return Schedule(tuple(groups), heads == 1, starts, layout.block_sizes.repeat(heads).to(device))


def _items(keep: np.ndarray, packed: np.ndarray, sizes: np.ndarray) -> _Items:
    # one opaque value per row makes "unique rows" a memcmp sort
    values = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    q_blocks = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    filled = [i for i, row in enumerate(first) if keep[row].any()]
    q_blocks = [q_blocks[i] for i in filled]
    kv_blocks = [np.flatnonzero(keep[first[i]]) for i in filled]
    queries = np.array([sizes[blocks].sum() for blocks in q_blocks])
    keys = np.array([sizes[blocks].sum() for blocks in kv_blocks])
    return _Items(queries, keys, q_blocks, kv_blocks)


def _groups(heads: list[_Items], num_blocks: int, device: torch.device) -> tuple[Group, ...]:
    members: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
    for h, items in enumerate(heads):
        for i in range(len(items.kv_blocks)):
            full = len(items.kv_blocks[i]) == num_blocks
            members.setdefault((int(items.queries[i]), int(items.keys[i]), full), []).append((h, i))
    groups = []
    for (queries, keys, full), pairs in members.items():
        q_rows, q_starts = _concatenate([heads[h].q_blocks[i] + h * num_blocks for h, i in pairs], device)
        kv_rows, kv_starts = _concatenate([heads[h].kv_blocks[i] + h * num_blocks for h, i in pairs], device)
        groups.append(Group(queries, keys, full, tuple(h for h, _ in pairs), q_rows, q_starts, kv_rows, kv_starts))
    return tuple(groups)


def _concatenate(parts: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, tuple[int, ...]]:
    starts = (0, *np.cumsum([len(part) for part in parts]).tolist())
    # 32 bits are enough for block numbers and halve what a long mask keeps in memory
    return torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device), starts
