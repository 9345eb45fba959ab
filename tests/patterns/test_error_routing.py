"""Error-aware routing: the estimate, and what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Array, Head, keeps_its_promises, make_call
from vidaccel.blockmask import BlockMask
from vidaccel.kernels import reference
from vidaccel.patterns import ErrorRouting, PooledTopK, choose_blocks


def _spread(head: Head, x: Array, block: int) -> float:
    rest = x[head.blocks[block]] - head.mean(x, block)
    return math.sqrt(np.mean([float(token @ token) for token in rest]))


def _oracle(head: Head, density: float) -> list[list[bool]]:
    count = math.ceil(density * len(head.video))
    spread = {j: _spread(head, head.v, j) + _spread(head, head.k, j) for j in head.video}
    rows = []
    for i in head.video:
        p = head.pooled(i)
        score = {j: p[j] * spread[j] / len(head.blocks[j]) for j in head.video}
        best = sorted(head.video, key=lambda j: -score[j])[:count]
        rows.append([j in best for j in head.video])
    return rows


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_it_is_its_formula(density: float) -> None:
    keeps_its_promises(ErrorRouting(aim=density), lambda head: _oracle(head, density))


def test_what_is_all_alike_is_left_to_its_mean() -> None:
    """Blocks of one repeated key and value are exactly their means, so the tail has no error and routing skips them."""
    layout = LAYOUTS[0]
    call = make_call(layout)
    of_token = layout.block_of_token
    flat = of_token % 2 == 0
    for x, means in ((call.k, call.k_means), (call.v, call.v_means)):
        x[:, flat] = means.transpose(1, 2)[:, of_token[flat]].double()
    pattern = ErrorRouting(aim=0.5)  # nine of the eighteen blocks, as many as are not flat
    del call.__dict__["k_means"], call.__dict__["v_means"]
    assert torch.equal(pattern.choose(call).any(2), (torch.arange(18) % 2 == 1).expand(2, 3, 18))
    errors = {}
    dense = reference.block_sparse_attention(call.q, call.k, call.v, layout, BlockMask.full(layout))
    for chosen in (pattern, PooledTopK(aim=0.5)):
        mask = BlockMask.from_dense(choose_blocks(chosen, call))
        out = reference.block_sparse_attention(call.q, call.k, call.v, layout, mask, tail=True)
        assert isinstance(out, torch.Tensor) and isinstance(dense, torch.Tensor)
        errors[chosen.name] = float((out - dense).abs().max())
    assert errors["error_routing"] < 1e-6 < 1e-2 < errors["pooled_top_k"]
