"""Re-ttention against its formula over the steps of a run, and its memory in a patched pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import vidaccel
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
from tests.patterns.calls import heads_of, make_call
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.blockmask import BlockMask
from vidaccel.compensation import Call, Rettention, build_compensation
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns.dynamic import HeadOrder


def _oracle(steps: Sequence[Head], kept: Array, period: int, growth: float) -> list[Array]:
    """Outputs of one head at consecutive steps."""
    outs = []
    rho, rest = np.zeros(0), np.zeros(0)
    for number, head in enumerate(steps):
        sparse = np.zeros_like(head.q)
        dense = np.zeros_like(head.q)
        share = np.ones(len(head.q))
        for i, tokens in enumerate(head.blocks):
            for t in tokens:
                sparse[t] = sparse_row(head, t, kept[i])
                dense[t] = sparse_row(head, t, np.ones_like(kept[i]))
                weights = [np.exp(head.scale * head.k[block] @ head.q[t]).sum() for block in head.blocks]
                share[t] = sum(w for j, w in enumerate(weights) if kept[i, j]) / sum(weights)
        skips = np.concatenate([[not kept[i].all()] * len(tokens) for i, tokens in enumerate(head.blocks)])
        if number % period == 0:
            rho, rest = share, dense - share[:, None] * sparse
            outs.append(dense)
        else:
            outs.append(np.where(skips[:, None], rho[:, None] * sparse + rest, sparse))
            rho = rho + growth
    return outs


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])
def test_it_is_its_formula(layout: TokenLayout) -> None:
    """Five steps from step 12 on, full at every third; q, k and v change from step to step."""
    rule, blocks = Rettention(period=3, growth=0.04), random_blocks(layout)
    memory: dict[str, Any] = {}
    steps = [replace(make_call(layout, seed=seed), step=12 + seed) for seed in range(5)]
    parts = [heads_of(heads) for heads in steps]
    expected = {
        (b, h): _oracle([sample[b][h] for sample in parts], blocks[b, h].numpy(), 3, 0.04) for b, h in ((0, 0), (1, 2))
    }
    for number, heads in enumerate(steps):
        call = replace(call_of(heads, blocks), memory=memory)
        out = rule.attend(call)
        for (b, h), outs in expected.items():
            assert_rounded(out[b, :, h], torch.from_numpy(outs[number]), 5 * allowed_of(heads))  # of up to 5 steps
        assert call.density == pytest.approx(call.share + (number % 3 == 0))
        whole = blocks.all(-1)[..., layout.block_of_token].transpose(1, 2)
        kernels = call.sparse()[whole]
        assert_rounded(out[whole], kernels, allowed_of(heads))


def test_the_first_step_is_dense_attention() -> None:
    """And everything that compensations have in common holds for it; here nothing changes between two calls."""

    class Second(Rettention):
        def attend(self, call: Call) -> torch.Tensor:
            super().attend(call)
            later = replace(call, heads=replace(call.heads, step=call.heads.step + 1))
            return super().attend(later)

    def dense(head: Head, kept: Array) -> Array:
        everything = np.ones(len(head.blocks), dtype=bool)
        return np.stack([sparse_row(head, t, everything) for t in range(len(head.q))])

    # without a change, rho * O_sparse + R is O_full again
    keeps_its_promises(Second(), dense)


def _step(rule: Rettention, step: int, seed: int, memory: dict[str, Any], blocks: torch.Tensor) -> tuple[Call, Any]:
    call = replace(call_of(replace(make_call(LAYOUTS[1], seed=seed), step=step), blocks), memory=memory)
    return call, rule.attend(call)


def test_a_repeated_step_gives_the_same_again() -> None:
    """A forward pass that is run twice, as checkpointing does, neither ages rho nor leaves other residuals behind."""
    rule, blocks = Rettention(period=4), random_blocks(LAYOUTS[1])
    plain: dict[str, Any] = {}
    once = [_step(rule, step, step, plain, blocks)[1] for step in range(6)]
    memory: dict[str, Any] = {}
    for step in range(6):
        for _ in range(3):
            _, out = _step(rule, step, step, memory, blocks)
            assert torch.equal(out, once[step])


def test_steps_that_were_skipped_count() -> None:
    """A cache ran steps 1 to 3 and 5: the next call is full, because the last full step is long ago."""
    rule, blocks = Rettention(period=4), random_blocks(LAYOUTS[1])
    memory: dict[str, Any] = {}
    assert _step(rule, 0, 0, memory, blocks)[0].density > 1
    assert _step(rule, 4, 1, memory, blocks)[0].density > 1
    assert _step(rule, 6, 2, memory, blocks)[0].density < 1
    assert _step(rule, 3, 3, memory, blocks)[0].density > 1, "an earlier step than the last full one"


def test_another_batch_is_a_full_step() -> None:
    rule, blocks = Rettention(), random_blocks(LAYOUTS[1])
    memory: dict[str, Any] = {}
    _step(rule, 0, 0, memory, blocks)
    alone = replace(make_call(LAYOUTS[1]).sample(0), step=1)
    call = replace(call_of(alone, blocks[:1]), memory=memory)
    rule.attend(call)
    assert call.density > 1


def test_blocks_stay_those_of_the_last_full_step() -> None:
    rule, first, second = Rettention(), random_blocks(LAYOUTS[1]), random_blocks(LAYOUTS[1], seed=1)
    memory: dict[str, Any] = {}
    _step(rule, 0, 0, memory, first)
    _, held = _step(rule, 1, 1, dict(memory), second)
    _, same = _step(rule, 1, 1, dict(memory), first)
    assert torch.equal(held, same)


def test_tokens_sorted_anew_are_refused() -> None:
    """Residuals lie by place; one order for all steps is fine, as of a pattern along a curve."""
    layout, rule = LAYOUTS[0], Rettention()
    blocks = random_blocks(layout)
    orders = [HeadOrder(x, x) for x in (torch.randperm(layout.tokens).view(1, 1, -1) for _ in range(2))]
    memory: dict[str, Any] = {}

    def step(number: int, order: HeadOrder | None) -> None:
        heads = replace(make_call(layout), step=number)
        heads = heads if order is None else heads.reordered(order)
        rule.attend(replace(call_of(heads, blocks), memory=memory))

    step(0, orders[0])
    step(1, HeadOrder(orders[0].q.clone(), orders[0].k))
    for other in (orders[1], None):
        with pytest.raises(ConfigError, match="sorts the tokens anew in each call; give it a pattern with one order"):
            step(2, other)


def _pipeline(rule: CompensationSpec, pattern: PatternSpec) -> tuple[Any, Any]:
    head = HeadPolicy(pattern, compensation=rule)
    plan = Plan("test", (Rule(LayerPolicy((head,))),), tile=TileShape(1, 2, 2))
    pipe = CASES[0].make()
    return pipe, vidaccel.patch(pipe, plan, strict=True)


def test_layers_and_guidance_branches_remember_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two layers and two branches finds its own residual, of the run's first step, and the next run none."""
    seen: dict[int, list[tuple[int, int | None]]] = {}
    attend = Rettention.attend

    def watched(self: Rettention, call: Call) -> torch.Tensor:
        seen.setdefault(id(call.memory), []).append((call.heads.step, call.memory.get("step")))
        out = attend(self, call)
        kept.append(call.memory)
        return out

    kept: list[Any] = []  # so that no memory takes the place of one that was freed
    monkeypatch.setattr(Rettention, "attend", watched)
    spec = CompensationSpec.make("rettention", period=2)
    pipe, session = _pipeline(spec, PatternSpec.make("sliding_tile", window=[1, 1, 1]))
    found = CASES[0].run(pipe)
    assert list(seen.values()) == [[(0, None), (1, 0), (2, 0)]] * 4
    # the first layer has not seen the prompt yet, the second has
    first, cond, _, uncond = (memory["rest"] for memory in {id(m): m for m in kept}.values())
    assert not torch.equal(cond, uncond) and not torch.equal(first, cond)
    share = BlockMask.from_dense(kept[0]["mask"].dense).density(kept[0]["layout"])
    report = session.report()
    # steps 0 and 2 of 3 are full
    assert report.density == pytest.approx(share + 2 / 3) and not report.fallbacks
    seen.clear()
    again = CASES[0].run(pipe)
    assert torch.equal(again, found)
    assert list(seen.values()) == [[(0, None), (1, 0), (2, 0)]] * 4


def test_a_period_of_one_is_the_dense_pipeline() -> None:
    pipe = CASES[0].make()
    dense = CASES[0].run(pipe)
    pipe, _ = _pipeline(
        CompensationSpec.make("rettention", period=1), PatternSpec.make("sliding_tile", window=[1, 1, 1])
    )
    assert_rounded(CASES[0].run(pipe), dense, bound_of_case(CASES[0]))


@pytest.mark.parametrize(
    ("params", "message"),
    [({"period": 0}, "period is 0; give a whole number"), ({"growth": -0.1}, "growth is -0.1; give a number from 0")],
)
def test_mistakes(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_compensation(CompensationSpec.make("rettention", **params))
