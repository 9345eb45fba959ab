"""RazorAttention's compensation token against its formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tests.compensation.calls import (
    LAYOUTS,
    Array,
    Head,
    allowed_of,
    call_of,
    keeps_its_promises,
    random_blocks,
    sparse_row,
)
from tests.patterns.calls import make_call
from tests.rounding import assert_rounded
from vidaccel.compensation import CompensationToken


def _oracle(head: Head, kept: Array) -> Array:
    out = np.zeros_like(head.q)
    for i, tokens in enumerate(head.blocks):
        dropped = [t for j, block in enumerate(head.blocks) if not kept[i, j] for t in block]
        for t in tokens:
            extra = []
            if dropped:
                logit = head.scale * float(head.q[t] @ head.k[dropped].mean(0)) + math.log(len(dropped))
                extra = [(logit, head.v[dropped].mean(0))]
            out[t] = sparse_row(head, t, kept[i], extra)
    return out


def test_it_is_its_formula() -> None:
    keeps_its_promises(CompensationToken(), _oracle)


def test_it_is_exact_where_all_skipped_tokens_are_alike() -> None:
    """Whatever the values: equal keys get equal weights, and those sum to the weight of their mean value."""
    for layout in LAYOUTS:
        row = random_blocks(layout, heads=1)[:1, :, layout.video_blocks.start + 2]
        heads, blocks = make_call(layout), row.unsqueeze(2).repeat(1, 1, layout.num_blocks, 1)
        dropped = ~blocks[0, 0, 0][layout.block_of_token]
        assert bool(dropped.any())
        k = heads.k.clone()
        k[:, dropped] = k[:, dropped][:, :1]
        heads = replace(heads, k=k, memory={})
        call = call_of(heads, blocks)
        assert_rounded(CompensationToken().attend(call), call.full_with_lse()[0], allowed_of(heads))
