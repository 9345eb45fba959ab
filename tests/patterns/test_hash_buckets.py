"""Hash buckets: blocks by the tokens they share buckets with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import layouts
from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import HashBuckets


def _oracle(head: Head, pattern: HashBuckets) -> list[list[bool]]:
    planes = pattern.planes(head.q.shape[1]).double().numpy()
    centred = head.k - head.k.mean(0)

    def buckets(x: np.ndarray) -> list[tuple[tuple[bool, ...], ...]]:
        signs = [[(token @ planes[:, r] > 0).tolist() for r in rounds] for token in x]
        return [tuple(tuple(hash_) for hash_ in token) for token in signs]

    rounds = range(pattern.rounds)
    of_q, of_k = buckets(head.q), buckets(centred)
    rows = []
    for i in head.video:
        query = head.mean(head.q, i)
        score = {}
        for j in head.video:
            equal = sum(of_q[a][r] == of_k[b][r] for a in head.blocks[i] for b in head.blocks[j] for r in rounds)
            score[j] = (equal / len(head.blocks[i]) / len(head.blocks[j]), float(query @ head.k_means[j]))
        best = sorted(head.video, key=lambda j: score[j], reverse=True)[: math.ceil(pattern.aim * len(head.video))]
        rows.append([j in best for j in head.video])
    return rows


@pytest.mark.parametrize(("density", "bits", "rounds"), [(0.25, 3, 2), (0.4, 6, 1)])
def test_it_is_its_formula(density: float, bits: int, rounds: int) -> None:
    pattern = HashBuckets(aim=density, bits=bits, rounds=rounds, seed=1)
    keeps_its_promises(pattern, lambda head: _oracle(head, pattern))


@settings(max_examples=30)
@given(layout=layouts(most=150), density=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_density_as_promised(layout: TokenLayout, density: float, seed: int) -> None:
    pattern = HashBuckets(aim=density, bits=3)
    kept = pattern.choose(make_call(layout, batch=1, heads=2, dim=4, seed=seed))
    assert bool((kept.sum(-1) == pattern.count(layout)).all())


def test_histograms_count_every_token_once_a_round_and_length_does_not_matter() -> None:
    call = make_call(LAYOUTS[2])
    pattern = HashBuckets(aim=0.2, bits=4, rounds=3)
    counts = pattern.histogram(call.q, call.layout)
    assert torch.equal(counts.sum(-1), (3.0 * call.sizes).expand(2, 3, -1))
    assert torch.equal(pattern.histogram(call.q * 7, call.layout), counts)
    assert not torch.equal(pattern.planes(16), HashBuckets(aim=0.2, bits=4, rounds=3, seed=1).planes(16))


def test_words_and_mistakes() -> None:
    assert HashBuckets(aim=0.25).resolved(LAYOUTS[0]) == "5 of 18 blocks a row by 4 hashes of 6 bits"
    for params, message in (({"bits": 11}, "bits is 11; give 1 to 10"), ({"rounds": 0}, "rounds is 0")):
        with pytest.raises(ConfigError, match=message):
            HashBuckets(aim=0.2, **params)
