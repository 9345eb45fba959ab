"""Extra keys that stand in for skipped blocks, merged with the kernel's result by its log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from ..kernels.merge import merge
from ..kernels.tail import pooled_tail
from ..patterns.rectangles import block_rows
from .base import Call
from .rows import wide

__all__ = ["StandIns", "attend_stand_ins"]

#: ``stand_ins(sample, head, blocks)`` for query blocks int64 [C]: keys and values, float32 [C,M,D], and bias, float32
#: [C,M], which is the logarithm of how many tokens each stands for, -inf for none. Every row stands for some token.
StandIns: TypeAlias = Callable[[int, int, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

#: Logits in memory at a time.
_AT_A_TIME = 1 << 22


def attend_stand_ins(call: Call, columns: int, stand_ins: StandIns) -> torch.Tensor:
    """Attention over the kept blocks and, for the query blocks that skip some, over the stand-ins as well.

    One softmax over both, computed as two and merged. Rows of blocks that skip nothing stay as the kernel made them.

    Args:
        columns: M, stand-ins of a query block.

    Returns:
        The output [B,S,H,D] in the dtype of q.
    """
    heads = call.heads
    out, lse = call.sparse_with_lse()
    rows = block_rows(heads.layout, None, heads.q.device)  # shorter blocks repeat tokens, which come out alike
    step = max(1, _AT_A_TIME // (rows.shape[1] * columns))
    batch, tokens, number, _ = heads.q.shape
    skipping = ~call.kept.all(-1).expand(batch, number, -1)
    sizes = heads.layout.block_sizes.double()
    listed = skipping.cpu()  # one wait for the device, not one a head
    call.add_pairs(float((listed * sizes).sum() / (batch * number)) * columns / tokens**2)
    for b in range(batch):
        for h in range(number):
            found = listed[b, h].nonzero().squeeze(-1).to(rows.device)
            for blocks in found.split(step) if len(found) else ():
                index = rows[blocks].flatten()
                queries = heads.q[b, index, h].unflatten(0, (len(blocks), -1))
                more, more_lse = pooled_tail(queries, *stand_ins(b, h, blocks), heads.scale)
                kept = wide(out[b, index, h])
                both, _ = merge(kept, lse[b, h, index], more.flatten(0, 1).to(kept), more_lse.flatten())
                out[b, index, h] = both.to(out.dtype)
    return out
