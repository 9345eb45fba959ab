"""Patterns that choose in each call, and observers of dense runs, inside a real pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vidaccel
from tests.rounding import assert_rounded, bound_of_case, rounding
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.engine.site import LayerCall
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, Heads, registry

CASE = CASES[0]
TILE = TileShape(2, 2, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest(DynamicPattern):
    """Each block keeps the block whose mean key is nearest to its mean query; the last one keeps nothing at all."""

    name: ClassVar[str] = "nearest_in_test"
    calls: ClassVar[list[tuple[float, int, int]]] = []

    def choose(self, heads: Heads) -> torch.Tensor:
        heads.memory["calls"] = heads.memory.get("calls", 0) + 1
        self.calls.append((heads.noise_level, heads.step, heads.memory["calls"]))
        video = heads.layout.video_blocks
        logits = heads.pooled_logits[:, :, video, video]
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
        keep[:, :, -1] = False
        return keep

    def resolved(self, layout: TokenLayout) -> str:
        return "one block"


@pytest.fixture
def nearest() -> Iterator[PatternSpec]:
    registry.register(Nearest)
    Nearest.calls.clear()
    yield PatternSpec.make("nearest_in_test")
    del registry._PATTERNS["nearest_in_test"]


def plan(policy: HeadPolicy, *more: HeadPolicy) -> Plan:
    return Plan("test", (Rule(LayerPolicy((policy, *more))),), tile=TILE)


def test_blocks_are_chosen_in_each_call(nearest: PatternSpec) -> None:
    pipe = CASE.make()
    dense = CASE.run(pipe)
    session = vidaccel.patch(pipe, plan(HeadPolicy(nearest)), strict=True)
    found = CASE.run(pipe)
    report = session.report()
    assert report.sparse_calls == report.calls == len(Nearest.calls)
    assert report.density is not None and 0 < report.density < 0.5
    assert torch.isfinite(found).all() and not torch.equal(found, dense)


def test_memory_is_kept_by_layer_and_branch_and_forgotten_by_the_next_run(nearest: PatternSpec) -> None:
    pipe = CASE.make()
    vidaccel.patch(pipe, plan(HeadPolicy(nearest)))
    for _ in range(2):
        Nearest.calls.clear()
        CASE.run(pipe)
        steps = sorted({step for _, step, _ in Nearest.calls})
        # two layers and two branches: in step i each finds what it left i times before, and no more
        assert steps == [0, 1, 2]
        for step in steps:
            assert [count for _, s, count in Nearest.calls if s == step] == [step + 1] * 4
        levels = [level for level, _, _ in Nearest.calls]
        assert levels == sorted(levels, reverse=True) and len(set(levels)) == 3


def test_static_and_dynamic_heads_share_a_layer(nearest: PatternSpec) -> None:
    pipe = CASE.make()
    window = HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1]), compensation="pooled_tail")
    heads = (HeadPolicy(nearest, compensation="pooled_tail"), window, HeadPolicy())
    session = vidaccel.patch(pipe, plan(*heads), strict=True)
    CASE.run(pipe)
    assert session.report().sparse_calls == session.report().calls


def test_a_dynamic_pattern_that_keeps_everything_equals_dense(nearest: PatternSpec, monkeypatch: Any) -> None:
    pipe = CASE.make()
    dense = CASE.run(pipe)
    monkeypatch.setattr(
        Nearest,
        "choose",
        lambda self, heads: torch.ones(
            *heads.q.shape[0:1], heads.q.shape[2], *[heads.layout.num_video_blocks] * 2, dtype=torch.bool
        ),
    )
    vidaccel.patch(pipe, plan(HeadPolicy(nearest, compensation="pooled_tail")))
    assert_rounded(CASE.run(pipe), dense, bound_of_case(CASE))


@dataclass
class Watcher:
    seen: list[tuple[str, int, float]]

    def wants(self, call: LayerCall) -> bool:
        return call.site.layer == 1

    def observe(self, call: LayerCall, heads: Heads, out: torch.Tensor) -> None:
        assert heads.layout.tile_shape == TILE and heads.q.shape[1] == heads.layout.tokens
        assert (heads.transformer, heads.layer) == ("transformer", 1)
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (heads.q, heads.k, heads.v))
        )
        assert_rounded(out, exact.transpose(1, 2), rounding(heads.q, heads.k, heads.v).out)
        self.seen.append((call.moment.branch or "", call.site.layer, call.moment.noise_level))


def test_an_observer_sees_dense_calls_and_changes_nothing() -> None:
    pipe = CASE.make()
    dense = CASE.run(pipe)
    session = vidaccel.patch(pipe, "dense")
    watcher = Watcher([])
    session.observer, session.observed_tile = watcher, TILE
    assert torch.equal(CASE.run(pipe), dense)
    assert [branch for branch, _, _ in watcher.seen] == ["cond", "uncond"] * 3
    assert not session.report().fallbacks
    vidaccel.unpatch(pipe)
    assert torch.equal(CASE.run(pipe), dense)
