"""One attention call: what falls back, what is raised, and what the report then says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vidaccel
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.engine import choice
from vidaccel.engine.ops import attention
from vidaccel.errors import PatchError, StrictError
from vidaccel.kernels import dispatch

WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])


def plan(policy: HeadPolicy | tuple[HeadPolicy, ...], **where: Any) -> Plan:
    heads = policy if isinstance(policy, tuple) else (policy,)
    return Plan("test", (Rule(LayerPolicy(heads), **where),), tile=TileShape(2, 2, 2))


def test_noise_levels_choose_the_policy() -> None:
    """Dense warm-up: the first of three steps is above the bound."""
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, plan(HeadPolicy(WINDOW), noise=(0.0, 0.9)))
    CASES[0].run(pipe)
    assert [(e["calls"], e["sparse_calls"]) for e in session.report().layers] == [(6, 4), (6, 4)]


def test_branch_and_layer_choose_the_policy() -> None:
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, plan(HeadPolicy(WINDOW), branch="uncond", layers=(1,)))
    CASES[0].run(pipe)
    assert [e["sparse_calls"] for e in session.report().layers] == [0, 3]


def test_a_window_over_the_whole_grid_runs_as_the_model_does() -> None:
    """Nothing is skipped, so there is nothing for a sparse kernel to do."""
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, plan(HeadPolicy(PatternSpec.make("sliding_tile", window=[1.0, 1.0, 1.0]))))
    CASES[0].run(pipe)
    report = session.report()
    assert report.kernels == {"dense": 12} and not report.fallbacks
    assert any("keeps every block of a 3x3x5 grid" in event for event in report.events)


def test_missing_precision_runs_natively_and_says_so() -> None:
    quantised = plan(HeadPolicy(WINDOW, precision="int8"))
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, quantised, kernel="torch-sparse")
    found = CASES[0].run(pipe)
    report = session.report()
    assert report.sparse_calls == report.calls
    assert sum(report.fallbacks.values()) == report.calls
    assert all("int8" in reason for reason in report.fallbacks)
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, plan(HeadPolicy(WINDOW)))
    assert torch.equal(CASES[0].run(pipe), found)
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, quantised, kernel="torch-sparse", strict=True)
    with pytest.raises(StrictError, match="int8"):
        CASES[0].run(pipe)


@pytest.mark.parametrize("precision", ["int8-fp8", "nvfp4"])
def test_few_bits_are_emulated_on_the_cpu_and_the_report_says_so(precision: str) -> None:
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, plan(HeadPolicy(WINDOW, precision=precision)), strict=True)
    found = CASES[0].run(pipe)
    report = session.report()
    assert report.kernels == {"emulated": 12} and not report.fallbacks
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, plan(HeadPolicy(WINDOW, precision=precision)), kernel="reference")
    torch.testing.assert_close(found, CASES[0].run(pipe), rtol=1e-2, atol=1e-2)


def test_the_oracle_runs_quantised_when_asked_by_name() -> None:
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, plan(HeadPolicy(WINDOW, precision="int8")), kernel="reference", strict=True)
    quantised = CASES[0].run(pipe)
    assert session.report().kernels == {"reference": 12}
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, plan(HeadPolicy(WINDOW)), kernel="reference")
    exact = CASES[0].run(pipe)
    assert not torch.equal(quantised, exact)
    torch.testing.assert_close(quantised, exact, rtol=0.05, atol=0.05)


def test_pooled_tail_is_closer_to_dense() -> None:
    dense = CASES[0].run(CASES[0].make())
    errors = {}
    for compensation in ("none", "pooled_tail"):
        pipe = CASES[0].make()
        vidaccel.patch(pipe, plan(HeadPolicy(WINDOW, compensation=compensation)), strict=True)
        errors[compensation] = (CASES[0].run(pipe) - dense).norm().item()
    assert errors["pooled_tail"] < 0.5 * errors["none"]


@pytest.mark.parametrize("damage", ["nan", "flat"])
def test_guard_reruns_the_call_dense(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """A kernel that returns rubbish in one call: the video equals that call dense, and the report says which."""
    real = dispatch.select
    calls = {"n": 0}

    class Broken:
        name, compiled = "broken", False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = self.inner(*args, **kwargs)
            calls["n"] += 1
            if calls["n"] == 3:
                out[:, :, 1] = float("nan") if damage == "nan" else 0.0
            return out

    monkeypatch.setattr(choice, "select", lambda *a, **k: Broken(real(*a, **k)))
    pipe = CASES[0].make()
    session = vidaccel.patch(pipe, plan(HeadPolicy(WINDOW)))
    found = CASES[0].run(pipe)
    assert torch.isfinite(found).all()
    report = session.report()
    assert report.kernels == {"broken": 11, "dense": 1}
    [reason] = report.fallbacks
    assert reason.startswith("guard: ") and "head 1" in reason
    assert any("layer 0, step 0" in event for event in report.events)


def test_bad_input_is_not_blamed_on_the_kernel() -> None:
    pipe = CASES[0].make()
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_v.weight[0, 0] = float("nan")
    session = vidaccel.patch(pipe, plan(HeadPolicy(WINDOW)))
    with pytest.warns(vidaccel.VidaccelWarning, match="the input of this layer is at fault"):
        found = CASES[0].run(pipe)
    assert session.report().layers[0]["sparse_calls"] == 0
    assert torch.isfinite(found).all()  # what is not finite counts as 0


def test_strict_raises_where_a_call_would_fall_back() -> None:
    model = CASES[0].make().transformer
    vidaccel.patch(model, plan(HeadPolicy(WINDOW)), strict=True)
    block = model.blocks[0].attn1
    with pytest.raises(StrictError, match="was not entered through its forward pass"):
        block(torch.randn(1, 45, 48))


def test_a_handle_without_session_is_an_error() -> None:
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(PatchError, match="session is gone"):
        attention(q, q, q, torch.tensor([10**9]))


def test_two_pipelines_with_different_plans_do_not_meet() -> None:
    first, second = CASES[0].make(), CASES[0].make()
    one = vidaccel.patch(first, plan(HeadPolicy(WINDOW)))
    two = vidaccel.patch(second, "dense")
    CASES[0].run(first)
    CASES[0].run(second)
    assert one.report().sparse_calls == one.report().calls == 12
    assert two.report().sparse_calls == 0 and two.report().calls == 12
    assert torch.equal(CASES[0].run(second), CASES[0].run(CASES[0].make()))
