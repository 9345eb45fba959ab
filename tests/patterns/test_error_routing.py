"""Error-aware routing: the estimate, and what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Head, expected, keeps_its_promises, make_call
from vidaccel.blockmask import BlockMask
from vidaccel.kernels import reference
from vidaccel.layout import TokenLayout
from vidaccel.patterns import ErrorRouting, Heads, PooledTopK, choose_blocks, spread
from vidaccel.types import TileShape, VideoGrid


def _oracle(head: Head, density: float) -> list[list[bool]]:
    count = math.ceil(density * len(head.video))
    rows = []
    for i in head.video:
        p = head.pooled(i)
        queries = head.q[head.blocks[i]] * head.scale
        score = {}
        for j in head.video:
            keys = head.k[head.blocks[j]] - head.mean(head.k, j)
            values = head.v[head.blocks[j]] - head.mean(head.v, j)
            logits = keys @ queries.T  # of the centred keys, for each query
            variance = float(np.mean(logits**2))
            missed = logits.T @ values / len(keys)
            error = math.sqrt(float(np.mean([m @ m for m in missed])))
            score[j] = p[j] * math.exp(min(variance / 2, 2.0)) * error / len(keys)
        best = sorted(head.video, key=lambda j: -score[j])[:count]
        rows.append([j in best for j in head.video])
    return rows


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_it_is_its_formula(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_AT_A_TIME", 1 << 13)  # one head at a time
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


def test_sixteen_bits_rank_nearly_alike() -> None:
    """16-bit inputs are multiplied as such; only blocks of nearly equal error may change places."""
    call = make_call(LAYOUTS[1])
    low = Heads(*(x.bfloat16() for x in (call.q, call.k, call.v)), call.layout)
    pattern = ErrorRouting(aim=0.3)
    for exact, rounded in zip(pattern.spreads(call), pattern.spreads(low), strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.01)
    assert (pattern.choose(low) == pattern.choose(call)).float().mean() > 0.97


@pytest.mark.parametrize("text_first", [False, True])
def test_equal_blocks_take_another_way_to_the_same_formula(text_first: bool) -> None:
    layout = TokenLayout.of(VideoGrid(4, 8, 8), TileShape(2, 4, 4), text_tokens=32, text_first=text_first)
    assert layout.uniform
    call = make_call(layout, heads=2)
    assert torch.equal(ErrorRouting(aim=0.3).choose(call), expected(lambda head: _oracle(head, 0.3), call))
