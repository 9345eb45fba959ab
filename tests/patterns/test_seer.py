"""SeerAttention's trained gates against their formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Array, Head, heads_of, make_call, softmax
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Heads, Reuse, Seer, build_pattern

GATE = 8
NAMES = ("seer.q", "seer.k", "seer.q_norm", "seer.k_norm")


def _given(layout: TokenLayout, *, norms: bool) -> Heads:
    """A call with the gates of four heads, of which it has those numbered 2, 0 and 3."""
    draw = torch.Generator().manual_seed(5)
    call = make_call(layout)
    dim = call.q.shape[-1]
    shapes = ((4, dim, GATE), (4, 3 * dim, GATE), (GATE,), (GATE,))
    weights = {name: torch.randn(shape, generator=draw) for name, shape in zip(NAMES, shapes, strict=True)}
    return replace(call, members=(2, 0, 3), weights=weights if norms else {name: weights[name] for name in NAMES[:2]})


def _probability(heads: Heads, head: Head, member: int, i: int) -> Array:
    """What the gate says of row i: one number a block, text included."""

    def projected(x: Array, which: str, norm: str) -> Array:
        y = x @ heads.weights[which][member].double().numpy()
        if norm in heads.weights:
            y = y / math.sqrt(float(np.mean(y**2)) + 1e-6) * heads.weights[norm].double().numpy()
        return np.asarray(y)

    q = projected(head.mean(head.q, i), "seer.q", "seer.q_norm")
    logits = []
    for tokens in head.blocks:
        k = head.k[tokens]
        pooled = np.concatenate([k.max(0), k.min(0), k.mean(0)])
        logits.append(float(q @ projected(pooled, "seer.k", "seer.k_norm")) / math.sqrt(GATE))
    return softmax(np.array(logits))


def _rows(heads: Heads, pattern: Seer) -> torch.Tensor:
    kept = []
    for sample in heads_of(heads):
        for head, member in zip(sample, heads.members, strict=True):
            rows = []
            for i in head.video:
                p = _probability(heads, head, member, i)[head.video]
                if pattern.threshold is not None:
                    rows.append([float(x) > pattern.threshold for x in p])
                    continue
                assert pattern.aim is not None
                best = np.argsort(-p)[: math.ceil(pattern.aim * len(p))]
                rows.append([j in best for j in range(len(p))])
            kept.append(rows)
    return torch.tensor(kept).unflatten(0, (len(heads_of(heads)), -1))


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("pattern", [Seer(aim=0.25), Seer(threshold=0.02)], ids=["top k", "threshold"])
def test_it_is_its_formula(pattern: Seer, norms: bool) -> None:
    for layout in LAYOUTS:
        heads = _given(layout, norms=norms)
        kept = pattern.choose(heads)
        assert torch.equal(kept, _rows(heads, pattern)), layout
        assert bool(kept.any()) and not bool(kept.all())
        if pattern.aim is not None:
            assert pattern.density(layout) == pytest.approx(kept.double().mean())


def test_samples_and_heads_on_their_own() -> None:
    heads = _given(LAYOUTS[1], norms=True)
    pattern = Seer(threshold=0.02)
    kept = pattern.choose(heads)
    assert not torch.equal(kept[0], kept[1])
    for b in range(2):
        assert torch.equal(pattern.choose(heads.sample(b)), kept[b : b + 1])
    order = torch.tensor([1, 2])
    assert torch.equal(pattern.choose(heads.only(order)), kept[:, order])
    low = replace(heads, **{x: getattr(heads, x).bfloat16() for x in "qkv"})
    assert (pattern.choose(low) == kept).double().mean() > 0.97


def test_without_weights_it_says_so() -> None:
    with pytest.raises(ConfigError, match=r"trained gate, and the layer has none; give .* vidaccel\.patch\(weights="):
        Seer(aim=0.5).choose(make_call(LAYOUTS[0]))


def test_by_name_and_inside_another_pattern() -> None:
    seer = PatternSpec.make("seer", density=0.2)
    assert build_pattern(seer) == Seer(aim=0.2) and Seer(aim=0.2).trained == ("seer",)
    outer = build_pattern(PatternSpec.make("reuse", pattern=seer))
    assert isinstance(outer, Reuse) and outer.trained == ("seer",)
    assert build_pattern(PatternSpec.make("reuse", pattern=PatternSpec.make("pooled_top_k", density=0.2))).trained == ()
    assert Seer(threshold=0.1).density(LAYOUTS[0]) is None
    assert "4 of 18 blocks a row by the gates" in Seer(aim=0.2).describe(LAYOUTS[0])
    assert "gates above 0.1" in Seer(threshold=0.1).describe(LAYOUTS[0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "density is None and threshold None; give one of them"),
        ({"density": 0.1, "threshold": 0.1}, "give one of them"),
        ({"density": 0.0}, "density is 0.0; give a share"),
        ({"threshold": 2}, "threshold is 2; give a share"),
    ],
)
def test_parameters_out_of_range(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_pattern(PatternSpec.make("seer", **wrong))
