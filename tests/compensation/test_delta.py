"""Delta attention against its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

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
from vidaccel.compensation import Delta, build_compensation
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.errors import ConfigError


def _oracle(head: Head, kept: Array, queries: int, nearest: bool, similarity: float) -> Array:
    out = np.zeros_like(head.q)
    for i, tokens in enumerate(head.blocks):
        for t in tokens:
            out[t] = sparse_row(head, t, kept[i])
        if i in head.text or kept[i].all():
            continue
        unit = head.q[tokens] / np.linalg.norm(head.q[tokens], axis=1, keepdims=True)
        if (unit @ unit.T).mean() < similarity:
            continue
        count = min(queries, len(tokens))
        for m in range(count):
            run = tokens[m * len(tokens) // count : (m + 1) * len(tokens) // count]
            chosen = run[0]
            if nearest:
                mean = head.q[run].mean(0)
                apart = ((head.q[run] - mean) ** 2).sum(-1)
                chosen = run[int(np.argmax(apart <= apart.min() * (1 + 1e-5)))]  # two tokens are equally near
            difference = sparse_row(head, chosen, np.ones(len(head.blocks), dtype=bool)) - out[chosen]
            for t in run:
                out[t] = out[t] + difference
    return out


@pytest.mark.parametrize(
    ("queries", "nearest", "similarity"), [(1, False, 0.0), (3, True, 0.0), (5, False, 0.6), (1, True, 0.7)]
)
def test_it_is_its_formula(queries: int, nearest: bool, similarity: float) -> None:
    rule = Delta(queries=queries, nearest=nearest, similarity=similarity)
    keeps_its_promises(rule, lambda head, kept: _oracle(head, kept, queries, nearest, similarity))


def test_the_gates_of_these_tests_are_open_for_some_blocks_and_closed_for_others() -> None:
    from vidaccel.patterns.sparge import self_similarity

    for layout in LAYOUTS:
        found = self_similarity(make_call(layout).q, layout)[:, :, layout.video_blocks]
        for gate in (0.6, 0.7):
            assert bool((found < gate).any()) and bool((found > gate).any())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])
def test_a_query_of_its_own_for_every_token_is_dense_attention(layout: Any) -> None:
    heads, blocks = make_call(layout), random_blocks(layout)
    call = call_of(heads, blocks)
    dense, _ = call_of(heads, blocks).full_with_lse()
    assert_rounded(Delta(queries=1000).attend(call), dense, allowed_of(heads))
    assert call.density == pytest.approx(call.share + layout.grid.tokens / layout.tokens)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"queries": 0}, "queries is 0; give a whole number of at least 1"),
        ({"nearest": 1}, "nearest is 1; give true or false"),
        ({"similarity": 1.5}, "similarity is 1.5; give a mean cosine from 0 to 1"),
    ],
)
def test_mistakes(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_compensation(CompensationSpec.make("delta", **params))
