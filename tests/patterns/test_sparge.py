"""SpargeAttn's first stage: gating by self-similarity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Array, Head, keeps_its_promises, make_call, softmax
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Heads, Sparge, build_pattern
from vidaccel.patterns.sparge import self_similarity


def _cosines(x: Array, tokens: list[int]) -> float:
    unit = [x[t] / math.sqrt(float(x[t] @ x[t])) for t in tokens]
    return float(np.mean([a @ b for a in unit for b in unit]))


def _oracle(head: Head, similarity: float, mass: float | None, density: float | None) -> list[list[bool]]:
    smooth = head.k - head.k.mean(0)
    odd_q = {i for i in head.video if _cosines(head.q, head.blocks[i]) <= similarity}
    odd_k = {j for j in range(len(head.blocks)) if _cosines(smooth, head.blocks[j]) <= similarity}
    means = [head.mean(smooth, j) for j in range(len(head.blocks))]
    rows = []
    for i in head.video:
        query = head.mean(head.q, i)
        logits = np.array(
            [
                -math.inf if j in odd_k else head.scale * float(query @ means[j]) + math.log(len(head.blocks[j]))
                for j in range(len(head.blocks))
            ]
        )
        p = softmax(logits)
        order = sorted(head.video, key=lambda j: -p[j])
        if mass is None:
            assert density is not None
            best = order[: max(1, int(density * len(head.video)))]
        else:
            held, best = sum(p[j] for j in head.text), []
            for j in order:  # as many as stay within the mass, and one in any case
                held += p[j]
                if held > mass and best:
                    break
                best.append(j)
        rows.append([j in best or i in odd_q or j in odd_k for j in head.video])
    return rows


@pytest.mark.parametrize(("similarity", "mass", "density"), [(0.55, 0.9, None), (0.62, None, 0.25), (-1.0, 0.5, None)])
def test_it_is_its_formula(similarity: float, mass: float | None, density: float | None) -> None:
    pattern = Sparge(similarity=similarity, mass=mass, aim=density)
    keeps_its_promises(pattern, lambda head: _oracle(head, similarity, mass, density))


def test_gates_really_open_and_close() -> None:
    """The case above is one where some blocks pass and some do not, for queries and for keys."""
    for layout in LAYOUTS:
        call = make_call(layout)
        for x in (call.q, call.k - call.k.mean(1, keepdim=True)):
            passed = self_similarity(x, layout) > 0.55
            assert bool(passed.any()) and not bool(passed.all())


def test_no_similar_key_block_keeps_everything() -> None:
    layout = TokenLayout.of(LAYOUTS[0].grid, LAYOUTS[0].tile_shape)
    call = make_call(layout)
    assert bool(Sparge(similarity=1.0, mass=0.1).choose(call).all())


def test_a_constant_in_k_changes_nothing() -> None:
    """K is smoothed, so what all keys share neither makes blocks alike nor moves the attention."""
    call = make_call(LAYOUTS[1])
    shifted = Heads(call.q, call.k + 3.0, call.v, call.layout)
    pattern = Sparge(similarity=0.55, mass=0.8)
    assert torch.equal(pattern.choose(shifted), pattern.choose(call))


def test_words_and_mistakes() -> None:
    assert Sparge(mass=0.9).density(LAYOUTS[0]) is None
    by_number = build_pattern(PatternSpec.make("sparge", density=0.5, similarity=-0.1))
    assert by_number.density(LAYOUTS[0]) == 0.5
    assert by_number.resolved(LAYOUTS[0]).startswith("9 of 18 blocks a row + whole rows and columns of blocks with a")
    for params, message in (
        ({}, "of mass and density neither is given; give one"),
        ({"mass": 0.9, "density": 0.5}, "both are given"),
        ({"mass": 2}, "mass is 2"),
        ({"density": 0}, "density is 0"),
        ({"mass": 0.9, "similarity": 1.5}, "similarity is 1.5; give a cosine from -1 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_pattern(PatternSpec.make("sparge", **params))
