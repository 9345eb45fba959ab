"""SALE: 4-bit estimates against the exact part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Array, Head, keeps_its_promises, make_call
from vidaccel.errors import ConfigError
from vidaccel.patterns import Sale
from vidaccel.patterns.sale import round_to_int4


def _int4(x: Array) -> Array:
    scale = np.abs(x).max(-1, keepdims=True) / 7
    return np.asarray(np.round(x / scale) * scale)


def _oracle(head: Head, threshold: float, rows: int | None) -> list[list[bool]]:
    mean = head.k.mean(0)
    exact = head.q @ head.k.T * head.scale
    estimate = _int4(head.q) @ _int4(head.k - mean).T * head.scale + (head.q @ mean * head.scale)[:, None]
    most = max(len(tokens) for tokens in head.blocks)
    found = []
    for i in head.video:
        tokens = head.blocks[i]
        count = len(tokens) if rows is None else min(rows, most)
        queries = {tokens[r * len(tokens) // count] for r in range(count)}
        part = sorted({*head.text, head.video[0], i})
        keys = [t for j in part for t in head.blocks[j]]
        weights = dict.fromkeys(head.video, 0.0)
        for t in queries:
            m = exact[t, keys].max()
            total = np.exp(exact[t, keys] - m).sum()
            for j in head.video:
                weights[j] = max(weights[j], float(np.exp(estimate[t, head.blocks[j]].max() - m) / total))
        kept = [j in part or weights[j] >= threshold for j in head.video]
        found.append(kept)
    return found


@pytest.mark.parametrize(("threshold", "rows"), [(0.05, None), (0.02, 4), (0.5, 1)])
def test_it_is_its_formula(threshold: float, rows: int | None) -> None:
    keeps_its_promises(Sale(threshold=threshold, rows=rows), lambda head: _oracle(head, threshold, rows))


def test_a_lower_threshold_and_more_queries_keep_more() -> None:
    call = make_call(LAYOUTS[2])
    all_rows, one = Sale(threshold=0.05).choose(call), Sale(threshold=0.05, rows=1).choose(call)
    assert bool((one <= all_rows).all()) and int(one.sum()) < int(all_rows.sum())
    lower = Sale(threshold=0.01).choose(call)
    assert bool((all_rows <= lower).all()) and int(all_rows.sum()) < int(lower.sum())


def test_four_bits_are_fifteen_numbers() -> None:
    x = torch.randn(50, 64)
    steps = round_to_int4(x) / (x.abs().amax(-1, keepdim=True) / 7)
    assert set(steps.round().int().unique().tolist()) == set(range(-7, 8))
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert not bool(round_to_int4(torch.zeros(3, 8)).any())


def test_words_and_mistakes() -> None:
    assert Sale(rows=8).resolved(LAYOUTS[0]).endswith("first block and text, 8 queries a block")
    with pytest.raises(ConfigError, match="threshold is 0"):
        Sale(threshold=0)
    with pytest.raises(ConfigError, match="rows is 0"):
        Sale(rows=0)
