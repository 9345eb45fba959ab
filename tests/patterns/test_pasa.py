"""PASA: scores and budget by loops, and where the curvature comes from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import vidaccel
from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call, softmax
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.engine.curvature import OutputCurvature
from vidaccel.engine.host import Attention
from vidaccel.engine.runs import DenoisingRun, Moment
from vidaccel.errors import ConfigError
from vidaccel.patterns import Heads, Pasa, PooledTopK, StochasticTopK

PATTERN = Pasa(aim=0.3, temperature=0.0, groups=3)


def _runs(block: list[int], groups: int) -> list[list[int]]:
    """The tokens of a block in as many runs, the n-th of N tokens in run n * groups // N."""
    return [[t for n, t in enumerate(block) if n * groups // len(block) == g] for g in range(groups)]


def _oracle(head: Head, groups: int, count: int, bias: list[list[float]] | None = None) -> list[list[bool]]:
    keys = [(j, run) for j, block in enumerate(head.blocks) for run in _runs(block, groups) if run]
    rows = []
    for a, i in enumerate(head.video):
        mine = [run for run in _runs(head.blocks[i], groups) if run]
        p = np.zeros(len(head.blocks))
        for run in mine:
            query = head.q[run].mean(0)
            weights = softmax(
                np.array([head.scale * float(query @ head.k[r].mean(0)) + math.log(len(r)) for _, r in keys])
            )
            for (j, _), weight in zip(keys, weights, strict=True):
                p[j] += weight / len(mine)
        score = [math.log(p[j]) + (0 if bias is None else bias[a][b]) for b, j in enumerate(head.video)]
        best = sorted(range(len(score)), key=lambda b: -score[b])[:count]
        rows.append([b in best for b in range(len(score))])
    return rows


def test_scores_are_their_formula() -> None:
    keeps_its_promises(PATTERN, lambda head: _oracle(head, 3, 6))


def test_chance_is_that_of_stochastic_top_k() -> None:
    pattern = replace(PATTERN, temperature=0.5, seed=4)
    bias = StochasticTopK(aim=0.3, seed=4).bias(LAYOUTS[0], 3)
    keeps_its_promises(pattern, lambda head: _oracle(head, 3, 6, (0.5 * pattern.bias(head.layout, 3)).tolist()))
    assert torch.equal(bias, pattern.bias(LAYOUTS[0], 3))


def test_one_group_is_pooled_top_k() -> None:
    call = make_call(LAYOUTS[1])
    assert torch.equal(replace(PATTERN, groups=1).choose(call), PooledTopK(aim=0.3).choose(call))


def test_the_budget_follows_the_curvature_within_bounds() -> None:
    pattern = replace(PATTERN, aim=0.5, gain=1.0, least=0.5, most=1.5)
    memory: dict[str, Any] = {}
    call = replace(make_call(LAYOUTS[0]), memory=memory)
    counts, seen = [], list[float]()
    for curvature in (None, 0.2, 0.2, 0.6, 0.01, 0.0):
        kept = pattern.choose(replace(call, curvature=curvature))
        counts.append(int(kept.sum(-1).unique()))
        seen += [] if curvature is None else [curvature]
        mean = sum(seen) / max(1, len(seen))
        factor = 1.0 if curvature is None else min(1.5, max(0.5, curvature / mean))
        assert counts[-1] == math.ceil(0.5 * factor * 18 - 1e-9)
    assert counts == [9, 9, 9, 14, 5, 5]
    flat = replace(pattern, gain=0.0)
    assert int(flat.choose(replace(call, curvature=5.0, memory={})).sum(-1).unique()) == 9


def test_curvature_is_the_relative_change_by_stream_of_passes() -> None:
    run = DenoisingRun()

    def at(step: int, branch: Any) -> Moment:
        return Moment(1 - step / 4, step, branch, (branch, 0))

    outputs = {branch: [torch.randn(1, 2, 3) for _ in range(3)] for branch in ("cond", "uncond")}
    for step in range(3):
        for branch, found in outputs.items():
            before = run.curvature("transformer", at(step, branch)).value
            if step < 2:
                assert before is None
            else:
                wanted = (found[1] - found[0]).square().sum().sqrt() / found[0].square().sum().sqrt()
                assert before == pytest.approx(float(wanted))
            mine = found[step].clone()
            run.curvature("transformer", at(step, branch)).note(mine)
            mine.zero_()  # what the pipeline does with it later
    assert run.curvature("transformer", at(3, "cond")).value is not None
    assert run.curvature("transformer_2", at(3, "cond")).value is None


def _plan(spec: PatternSpec) -> Plan:
    return Plan("test", (Rule(LayerPolicy((HeadPolicy(spec, compensation="pooled_tail"),))),), tile=TileShape(1, 1, 2))


def test_a_pipeline_tells_it_the_outputs_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers and two branches; only from the third step on are there two outputs to compare."""
    seen: list[tuple[int, int, float | None]] = []
    choose = Pasa.choose

    def watched(self: Pasa, heads: Heads) -> torch.Tensor:
        seen.append((heads.step, heads.layer, heads.curvature))
        return choose(self, heads)

    monkeypatch.setattr(Pasa, "choose", watched)
    pipe = CASES[0].make()
    hooks = len(pipe.transformer._forward_hooks)
    outputs: list[torch.Tensor] = []
    watch = pipe.transformer.register_forward_hook(lambda module, args, out: outputs.append(out[0].clone()))
    vidaccel.patch(pipe, _plan(PatternSpec.make("pasa", density=0.4)), strict=True)
    CASES[0].run(pipe)
    assert [c for step, _, c in seen if step < 2] == [None] * 8
    for branch in range(2):  # passes go cond, uncond, cond, ...
        first, second = outputs[branch], outputs[branch + 2]
        wanted = float((second - first).norm() / first.norm())
        assert [c for step, _, c in seen if step == 2][2 * branch :][:2] == [pytest.approx(wanted, rel=1e-4)] * 2
    seen.clear()
    CASES[0].run(pipe)
    assert [c for step, _, c in seen if step < 2] == [None] * 8, "a new run knows nothing of the last"
    vidaccel.unpatch(pipe)
    watch.remove()
    assert len(pipe.transformer._forward_hooks) == hooks


@pytest.mark.parametrize(("name", "kept"), [("pasa", 6), ("pooled_top_k", 0)])
def test_outputs_are_kept_for_those_that_ask(name: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[torch.Tensor] = []
    monkeypatch.setattr(OutputCurvature, "note", lambda self, output: noted.append(output))
    pipe = CASES[0].make()
    vidaccel.patch(pipe, _plan(PatternSpec.make(name, density=0.4)))
    CASES[0].run(pipe)
    assert len(noted) == kept, "three steps, two passes"


def test_attention_without_a_model_refuses_it() -> None:
    with pytest.raises(ConfigError, match="which attention calls do not show"):
        Attention(_plan(PatternSpec.make("pasa", density=0.4)))


def test_words_and_mistakes() -> None:
    pattern = Pasa(aim=0.3)
    assert pattern.resolved(LAYOUTS[0]) == (
        "6 of 18 blocks a row, drawn at temperature 0.3, 3 to 11 by the curvature, 2 means a block"
    )
    for change, message in (
        ({"gain": -1.0}, "gain is -1.0; give a number of at least 0"),
        ({"least": 1.5}, "least is 1.5; give a number from 0 to 1"),
        ({"most": 0.5}, "most is 0.5; give a number of at least 1"),
        ({"gain": math.nan}, "gain is nan"),
        ({"groups": 0}, "groups is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(pattern, **change)
