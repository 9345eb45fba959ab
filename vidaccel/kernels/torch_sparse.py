"""Block-sparse attention from dense attention: gather the kept key blocks, run SDPA on them, put the rows back.

Runs wherever torch runs, and is faster than dense there because the skipped work is really not done: no score is
computed and masked away, and nothing of size L x L exists. A few heads at a time, for each
chunk of items of equal size (:mod:`.schedule`)::

    q_i [n,Lq,D], k_i, v_i [n,Lk,D]  = gather(q, k, v)
    o_i, lse_i                       = SDPA(q_i, k_i, v_i)
    o_i, lse_i                       = merge((o_i, lse_i), pooled_tail(q_i, means of the skipped blocks))   if tail
    out, lse                         = scatter(o_i, lse_i)

Blocks that a rule over tokens cuts are a second partial result, merged with the first (:mod:`.partial`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

import torch

from ..blockmask import BlockMask
from ..errors import KernelError
from ..layout import TokenLayout
from ..pooling import block_means, log_block_sizes
from ..types import PRECISIONS, Precision
from .contract import AttentionResult, KernelRequest, Skips, check_inputs
from .dense import attention_with_lse
from .merge import merge
from .partial import PartialPlan, masked_attention, partial_plan
from .schedule import Group, Schedule, schedule
from .tail import pooled_tail

__all__ = ["block_sparse_attention", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Bytes of one head slab of q, of k and of v: copied to head order and gathered from while still in the caches.
_SLAB_BYTES = {"cpu": 2 << 20}
_SLAB_BYTES_ELSEWHERE = 1 << 30

#: Bytes of gathered keys and values per call: enough tiles to fill the cores, few enough to stay near the caches.
_CHUNK_BYTES = {"cpu": 4 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20


def why_not(request: KernelRequest) -> str | None:
    """Why this kernel cannot run the request, or ``None``."""
    if request.precision.quantised:
        return f"computes in the input's dtype only; precision {request.precision.name!r} is quantised"
    if request.dtype not in _DTYPES:
        return f"{request.dtype} is not supported; valid are {', '.join(map(str, _DTYPES))}"
    if request.skip:
        return "gathers a whole list before it sees a score, so it cannot skip blocks on the way"
    if request.device == "meta":
        return "meta tensors hold no data to attend"
    return None


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    *,
    scale: float | None = None,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
    return_lse: bool = False,
    skips: Skips | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; arguments as :class:`.contract.Kernel` has them.

    Returns:
        The output [B,S,H,D] in q's dtype and, if asked, the LSE [B,H,S].

    Raises:
        LayoutError: if shapes and layout do not fit together.
        KernelError: if :func:`why_not` has a reason.
    """
    check_inputs(q, k, v, layout, mask)
    reason = why_not(KernelRequest.of(q, precision, tail=tail, return_lse=return_lse, skip=skips is not None))
    if reason:
        raise KernelError(f"torch-sparse cannot run this: {reason}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    plan = schedule(mask, layout, q.device)
    cuts = None if mask.rule is None else partial_plan(mask, mask.rule, layout, q.device)
    if cuts is None and all(
        group.full and group.queries == layout.tokens for groups in plan.groups for group in groups
    ):
        out, lse = attention_with_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
        out = out.transpose(1, 2)
    else:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        budget = _SLAB_BYTES.get(q.device.type, _SLAB_BYTES_ELSEWHERE)
        together = max(1, budget // (q.shape[1] * q.shape[3] * q.element_size()))
        for b in range(q.shape[0]):
            groups = plan.groups[b if len(plan.groups) > 1 else 0]
            for first in range(0, q.shape[2], together):
                heads = range(first, min(first + together, q.shape[2]))
                part = (b, slice(None), slice(first, heads.stop))
                slab = _Slab(q[part], k[part], v[part], heads, layout, plan, scale, tail, cuts)
                for group in groups:
                    slab.run(group)
                if cuts is not None:
                    slab.add_partial(cuts, b if len(cuts.groups) > 1 else 0)
                out[part] = slab.out.transpose(0, 1)
                lse[b, first : heads.stop] = slab.lse
    return (out, lse) if return_lse else out


class _Slab:
    """Some heads of one batch entry: q, k, v come as [S,h,D]; ``out`` [h,S,D] and ``lse`` [h,S] are filled."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: range,
        layout: TokenLayout,
        plan: Schedule,
        scale: float,
        tail: bool,
        cuts: PartialPlan | None,
    ) -> None:
        self.q, self.k, self.v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
        if cuts is None:
            self.out, self.lse = torch.empty_like(self.q), self.q.new_empty(self.q.shape[:2], dtype=torch.float32)
        else:  # results are merged in: a row may have no whole block
            self.out = torch.zeros_like(self.q, dtype=torch.float32)
            self.lse = self.q.new_full(self.q.shape[:2], -math.inf, dtype=torch.float32)
        self.heads, self.head_dim, self.cut = heads, q.shape[-1], cuts is not None
        self.layout, self.plan, self.scale = layout, plan, scale
        # what one index moves: a whole block where all have one size, else a token
        self.units = layout.num_blocks if layout.uniform else layout.tokens
        self.means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if tail:
            log_sizes = log_block_sizes(layout, q.device)
            self.means = block_means(self.k, layout), block_means(self.v, layout), log_sizes

    def run(self, group: Group) -> None:
        """Attention of the group's items that belong to these heads, written to ``out`` and ``lse``."""
        for heads, items in self._chunks(group):
            q_index = self._index(group.q_rows, group.q_starts, heads, items)
            q = self._gather(self.q, q_index, group.queries).unsqueeze(1)
            if group.full:
                first = heads.start if self.plan.shared else group.heads[items.start] - self.heads.start
                k, v = (x[first : first + q.shape[0]].unsqueeze(1) for x in (self.k, self.v))
            else:
                kv_index = self._index(group.kv_rows, group.kv_starts, heads, items)
                k, v = (self._gather(x, kv_index, group.keys).unsqueeze(1) for x in (self.k, self.v))
            out, lse = attention_with_lse(q, k, v, self.scale)  # one "head" per item
            if self.means is not None and not group.full and not self.cut:
                tail_out, tail_lse = self._tail(q.squeeze(1), group, heads, items, self.means)
                out, lse = merge(out.float(), lse, tail_out.unsqueeze(1), tail_lse.unsqueeze(1))
            self._scatter(self.out, q_index, out.to(self.out.dtype))
            self._scatter(self.lse, q_index, lse)

    def _chunks(self, group: Group) -> Iterator[tuple[range, range]]:
        """(heads, items) to run in one call; ``heads`` counts from the slab's first, for a shared mask only."""
        heads, items = range(1), range(len(group))
        if self.plan.shared:
            heads = range(len(self.heads))
        else:
            items = range(*(bisect_left(group.heads, h) for h in (self.heads.start, self.heads.stop)))
        if group.full:
            yield from ((heads, run) for run in group.runs(items))
            return
        budget = _CHUNK_BYTES.get(self.q.device.type, _CHUNK_BYTES_ELSEWHERE)
        most = max(1, budget // (2 * group.keys * self.head_dim * self.q.element_size()))
        together = max(1, most // max(1, len(items)))  # heads, when one head's items do not fill a chunk
        for h in range(0, len(heads), together):
            for i in range(items.start, items.stop, most):
                yield heads[h : h + together], range(i, min(i + most, items.stop))

    def _index(self, rows: torch.Tensor, starts: tuple[int, ...], heads: range, items: range) -> torch.Tensor:
        """Where the blocks of these items lie in the slab, in units."""
        index = rows[starts[items.start] : starts[items.stop]]
        if not self.layout.uniform:
            index = self.plan.tokens(index)
        if self.plan.shared:
            index = index + torch.tensor(heads, dtype=index.dtype, device=index.device)[:, None] * self.units
        else:
            index = index - self.heads.start * self.units
        return index.reshape(-1)

    def _gather(self, x: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
        return x.view(len(self.heads) * self.units, -1).index_select(0, index).view(-1, length, self.head_dim)

    def _scatter(self, target: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
        rows = target.view(len(self.heads) * self.units, -1)
        rows.index_copy_(0, index.long(), values.reshape(-1, rows.shape[1]))

    def _tail(
        self,
        q: torch.Tensor,
        group: Group,
        heads: range,
        items: range,
        means: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_means, v_means, log_sizes = means
        starts = group.kv_starts[items.start : items.stop + 1]
        item = torch.repeat_interleave(torch.arange(len(items)), torch.tensor(starts).diff()).to(q.device)
        kept = group.kv_rows[starts[0] : starts[-1]].long() % self.layout.num_blocks
        bias = log_sizes.repeat(len(items), 1)
        bias[item, kept] = -math.inf
        if self.plan.shared:
            head = torch.tensor(heads, device=q.device).repeat_interleave(len(items))
            bias = bias.repeat(len(heads), 1)
        else:
            head = torch.tensor(group.heads[items.start : items.stop], device=q.device) - self.heads.start
        return pooled_tail(q, k_means[head], v_means[head], bias, self.scale)

    def add_partial(self, cuts: PartialPlan, entry: int) -> None:
        """Merges in the partial blocks and, where it is wanted, the tail of what is neither kept nor partial."""
        budget = _CHUNK_BYTES.get(self.q.device.type, _CHUNK_BYTES_ELSEWHERE)
        tile = cuts.slots.shape[1]
        for head, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True)):
            place = 0 if self.plan.shared else self.heads.start + head
            for group in cuts.groups[entry][place]:
                keys = group.k_blocks.shape[1] * tile
                together = max(1, budget // (4 * keys * (2 * self.head_dim + tile)))
                parts = (x.split(together) for x in (group.q_blocks, group.k_blocks, group.masks))
                for q_blocks, k_blocks, masks in zip(*parts, strict=True):
                    n = len(q_blocks)
                    kv_slots = cuts.slots[k_blocks].view(n, keys)
                    bias = cuts.bias[masks].transpose(1, 2).reshape(n, tile, keys)
                    q_rows, k_rows, v_rows = _taken(q, cuts.slots[q_blocks]), _taken(k, kv_slots), _taken(v, kv_slots)
                    out, lse = masked_attention(q_rows, k_rows, v_rows, bias, cuts.alive[masks].any(1), self.scale)
                    self._merge(head, cuts, q_blocks, out, lse)
            if self.means is not None:
                q_blocks = cuts.skipped[entry, place].any(-1).nonzero().squeeze(-1)
                k_head, v_head = self.means[0][head], self.means[1][head]
                for blocks in q_blocks.split(max(1, budget // (4 * tile * self.layout.num_blocks))):
                    bias = cuts.tail_bias[entry, place][blocks]
                    k_means, v_means = (x.expand(len(blocks), -1, -1) for x in (k_head, v_head))
                    tail = pooled_tail(_taken(q, cuts.slots[blocks]), k_means, v_means, bias, self.scale)
                    self._merge(head, cuts, blocks, *tail)

    def _merge(
        self, head: int, cuts: PartialPlan, q_blocks: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Merges a partial result, [n,T,D] and [n,T] over the slots of these query blocks, into the head's."""
        filled = cuts.filled[q_blocks]
        tokens = cuts.slots[q_blocks][filled]
        merged = merge(self.out[head, tokens], self.lse[head, tokens], out[filled], lse[filled])
        self.out[head, tokens], self.lse[head, tokens] = merged


def _taken(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of x [S,D] at these positions [n,L]: float32 [n,L,D]."""
    return x.index_select(0, tokens.reshape(-1)).view(*tokens.shape, x.shape[-1]).float()
