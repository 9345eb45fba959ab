"""Masks kept over steps: when they stay, when they go, and that nobody else's memory is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from tests.patterns.calls import LAYOUTS, make_call
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, Heads, PooledTopK, Reuse, build_pattern

INNER = PooledTopK(aim=0.3)
REUSE = Reuse(pattern=INNER, drift=0.1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Counting(DynamicPattern):
    """Top-k that notes how many heads it was asked about."""

    name: ClassVar[str] = "counting"
    asked: list[int]

    def choose(self, heads: Heads) -> torch.Tensor:
        self.asked.append(heads.q.shape[2])
        return INNER.choose(heads)

    def resolved(self, layout: TokenLayout) -> str:
        return ""


def _later(call: Heads, change: float, memory: dict[str, Any], which: int | None = None) -> Heads:
    """The call a step later: keys moved by so much of their means' size, in one head or all."""
    k = call.k.clone()
    moved = slice(None) if which is None else slice(which, which + 1)
    k[:, :, moved] *= 1 + change
    return Heads(call.q, k, call.v, call.layout, memory, step=call.step + 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])
def test_blocks_stay_below_the_drift_and_are_new_above(layout: TokenLayout) -> None:
    memory: dict[str, Any] = {}
    first = replace(make_call(layout), memory=memory)
    other = make_call(layout, seed=9)
    chosen = REUSE.choose(first)
    assert torch.equal(chosen, INNER.choose(first))
    near = Heads(first.q, 0.93 * first.k + 0.03 * other.k, first.v, layout, memory)
    assert not torch.equal(INNER.choose(near), chosen), "or keeping would show nothing"
    assert torch.equal(REUSE.choose(near), chosen)
    far = Heads(other.q, other.k, other.v, layout, memory)
    assert torch.equal(REUSE.choose(far), INNER.choose(far))


def test_drift_is_measured_from_the_choice_so_slow_changes_add_up() -> None:
    memory: dict[str, Any] = {}
    asked: list[int] = []
    pattern = Reuse(pattern=Counting(asked=asked), drift=0.1)
    call = replace(make_call(LAYOUTS[0]), memory=memory)
    for step in range(6):  # 0, 4, 8, 12, 16, 20% from the first; 12% is chosen anew, and 20 is 7% from there
        pattern.choose(_later(call, 0.04 * step, memory))
    assert asked == [3, 3]


def test_only_drifted_heads_are_chosen_anew() -> None:
    memory: dict[str, Any] = {}
    asked: list[int] = []
    pattern = Reuse(pattern=Counting(asked=asked), drift=0.1)
    call = replace(make_call(LAYOUTS[1]), memory=memory)
    before = pattern.choose(call)
    other = make_call(LAYOUTS[1], seed=5)
    mixed = Heads(call.q.clone(), call.k.clone(), call.v, call.layout, memory)
    mixed.q[:, :, 1], mixed.k[:, :, 1] = other.q[:, :, 1], other.k[:, :, 1]
    after = pattern.choose(mixed)
    assert asked == [3, 1]
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert torch.equal(after[:, 1], INNER.choose(mixed)[:, 1]) and not torch.equal(after[:, 1], before[:, 1])
    again = pattern.choose(Heads(mixed.q, mixed.k, mixed.v, call.layout, memory))
    assert asked == [3, 1] and torch.equal(again, after)


def test_changes_are_relative_norms() -> None:
    before = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    now = before.clone()
    now[0, 1, 2] *= 1.25
    now[1, 0, 0] *= 0.5
    torch.testing.assert_close(Reuse.changes(before, now), torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64))


def test_memories_are_apart_and_results_are_copies() -> None:
    """The engine gives each guidance branch a memory of its own; what one remembers does not reach the other."""
    cond: dict[str, Any] = {}
    uncond: dict[str, Any] = {}
    first, second = make_call(LAYOUTS[0]), make_call(LAYOUTS[0], seed=7)
    a = REUSE.choose(replace(first, memory=cond))
    b = REUSE.choose(replace(second, memory=uncond))
    assert torch.equal(b, INNER.choose(second)) and not torch.equal(a, b)
    kept = REUSE.choose(replace(first, memory=cond))
    assert torch.equal(kept, a)
    kept.fill_(True)  # a caller's own
    assert torch.equal(REUSE.choose(replace(first, memory=cond)), a)
    assert torch.equal(REUSE.choose(replace(second, memory=uncond)), b)


def test_another_batch_or_layout_begins_anew() -> None:
    memory: dict[str, Any] = {}
    REUSE.choose(replace(make_call(LAYOUTS[0]), memory=memory))
    single = make_call(LAYOUTS[0], batch=1, seed=3)
    assert torch.equal(REUSE.choose(replace(single, memory=memory)), INNER.choose(single))
    text = make_call(LAYOUTS[1])
    assert torch.equal(REUSE.choose(replace(text, memory=memory)), INNER.choose(text))


def test_specs_words_and_mistakes() -> None:
    spec = PatternSpec.from_data({"name": "reuse", "pattern": {"name": "pooled_top_k", "density": 0.3}})
    pattern = build_pattern(spec)
    assert pattern == REUSE and pattern.density(LAYOUTS[0]) == 6 / 18
    assert REUSE.resolved(LAYOUTS[0]) == "pooled_top_k (6 of 18 blocks a row), kept up to a drift of 0.1"
    for params, message in (
        ({"pattern": PatternSpec("radial")}, "give one that chooses its blocks in each call"),
        ({"pattern": spec}, "give one that chooses its blocks in each call"),
        ({"pattern": PatternSpec.make("draft", density=0.1), "drift": -0.1}, "drift is -0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_pattern(PatternSpec.make("reuse", **params))
