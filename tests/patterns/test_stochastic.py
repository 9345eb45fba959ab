"""Blocks drawn by their estimated attention."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call
from vidaccel.errors import ConfigError
from vidaccel.patterns import PooledTopK, StochasticTopK


def _oracle(head: Head, pattern: StochasticTopK, step: int) -> list[list[bool]]:
    bias = pattern.bias(head.layout, step).tolist()
    rows = []
    for row, i in enumerate(head.video):
        p = head.pooled(i)
        score = {j: math.log(p[j]) + pattern.temperature * bias[row][c] for c, j in enumerate(head.video)}
        best = sorted(head.video, key=lambda j: -score[j])[: math.ceil(pattern.aim * len(head.video))]
        rows.append([j in best for j in head.video])
    return rows


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_it_is_its_formula(temperature: float) -> None:
    pattern = StochasticTopK(aim=0.3, temperature=temperature, seed=4)
    keeps_its_promises(pattern, lambda head: _oracle(head, pattern, make_call(head.layout).step))


def test_without_temperature_it_is_top_k() -> None:
    call = make_call(LAYOUTS[2])
    assert torch.equal(StochasticTopK(aim=0.3, temperature=0).choose(call), PooledTopK(aim=0.3).choose(call))


def test_steps_and_seeds_draw_anew_and_runs_alike() -> None:
    call = make_call(LAYOUTS[0])
    pattern = StochasticTopK(aim=0.3, temperature=1.0)
    kept = pattern.choose(call)
    assert torch.equal(pattern.choose(replace(call)), kept)
    assert not torch.equal(pattern.choose(replace(call, step=4)), kept)
    assert not torch.equal(StochasticTopK(aim=0.3, temperature=1.0, seed=1).choose(call), kept)


def test_single_blocks_are_drawn_as_often_as_they_are_attended() -> None:
    """At temperature 1 and one block a row, the frequency over many steps is P (Gumbel's maximum)."""
    call = make_call(LAYOUTS[0], batch=1, heads=1)
    call.q[:] *= 0.3
    pattern = StochasticTopK(aim=0.01, temperature=1.0)
    drawn = sum(pattern.choose(replace(call, step=step)).double() for step in range(3000)) / 3000
    assert isinstance(drawn, torch.Tensor)
    p = (call.pooled_logits + call.sizes.log()).softmax(-1).double()
    torch.testing.assert_close(drawn, p, rtol=0, atol=0.05)


def test_words_and_mistakes() -> None:
    assert StochasticTopK(aim=0.25).resolved(LAYOUTS[0]) == "5 of 18 blocks a row, drawn at temperature 0.3"
    with pytest.raises(ConfigError, match="temperature is -1"):
        StochasticTopK(aim=0.3, temperature=-1)
