"""When the kernels of a plan are tested, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vidaccel
import vidaccel.pipelines.patch as patch_module
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.configs.presets import load_preset
from vidaccel.engine.proof import requests_of
from vidaccel.errors import StrictError
from vidaccel.kernels import dispatch
from vidaccel.kernels.dispatch import FunctionKernel, torch_sparse

CASE = CASES[0]
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])
PLAN = Plan("test", (Rule(LayerPolicy((HeadPolicy(WINDOW),))),), tile=TileShape(2, 2, 2))
WRONG = (
    "kernel made here failed (its self-test on this device: wrong: case 'native, 16 channels': the output's error is"
)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], list[int]]:
    """Puts a kernel that is made on this machine before the others; returns the tokens of each of its calls."""

    def put(change: Callable[[Any], Any] = lambda out: out) -> list[int]:
        tokens: list[int] = []

        def function(q: torch.Tensor, *tensors: Any, **options: Any) -> Any:
            tokens.append(q.shape[1])
            return change(torch_sparse.block_sparse_attention(q, *tensors, **options))

        first = FunctionKernel("made here", function, lambda request: None, compiled=True)
        monkeypatch.setattr(dispatch, "_KERNELS", (first, *dispatch._KERNELS))
        return tokens

    return put


def shifted(result: Any) -> Any:
    """What a kernel gives that writes rows to the wrong place."""
    return (result[0].roll(1, 1), result[1]) if isinstance(result, tuple) else result.roll(1, 1)


def test_a_kernel_is_tested_while_patching(put: Callable[..., list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    tokens = put()
    pipe = CASE.make()
    session = vidaccel.patch(pipe, PLAN, strict=True)
    assert len(tokens) == 1 and capsys.readouterr().err.count("testing kernel made here") == 1
    CASE.run(pipe)
    assert session.report().kernels == {"made here": 12} and len(tokens) == 13
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, PLAN)
    assert len(tokens) == 13 and not capsys.readouterr().err, "it is known on this machine"


def test_otherwise_it_is_tested_in_the_first_step(
    put: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that goes to its GPU after patching; a plan whose first steps are dense waits for none."""
    monkeypatch.setattr(patch_module, "_prove", lambda *_: None)
    tokens = put()
    pipe = CASE.make()
    session = vidaccel.patch(pipe, replace(PLAN, rules=(Rule(LayerPolicy((HeadPolicy(WINDOW),)), noise=(0.0, 0.9)),)))
    assert not tokens
    seen: list[int] = []

    def after_each_step(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(tokens))
        return inputs

    pipe(**{**CASE.call(), "callback_on_step_end": after_each_step})
    assert seen[0] == 1, "the first step is dense, and the kernel was tested in it"
    assert session.report().kernels == {"dense": 4, "made here": 8} and len(tokens) == 9


def test_a_wrong_kernel_never_runs(put: Callable[..., list[int]]) -> None:
    pipe = CASE.make()
    vidaccel.patch(pipe, PLAN)
    expected = CASE.run(pipe)
    tokens = put(shifted)
    pipe = CASE.make()
    with pytest.warns(vidaccel.VidaccelWarning, match="kernel made here is not used: its self-test"):
        session = vidaccel.patch(pipe, PLAN)
    found = CASE.run(pipe)
    assert torch.equal(found, expected) and len(tokens) == 1
    report = session.report()
    assert report.kernels == {"torch-sparse": 12}
    [(reason, count)] = report.fallbacks.items()
    assert reason.startswith(WRONG) and reason.endswith("torch-sparse takes its place") and count == 12


def test_a_strict_session_says_it(put: Callable[..., list[int]]) -> None:
    put(shifted)
    pipe = CASE.make()
    with pytest.warns(vidaccel.VidaccelWarning, match="is not used"):
        vidaccel.patch(pipe, PLAN, strict=True)
    with pytest.raises(StrictError, match="its self-test on this device: wrong"):
        CASE.run(pipe)


def test_the_named_kernel_is_tested_too(put: Callable[..., list[int]]) -> None:
    put(shifted)
    pipe = CASE.make()
    with pytest.warns(vidaccel.VidaccelWarning, match="is not used"):
        session = vidaccel.patch(pipe, PLAN, kernel="made here")
    CASE.run(pipe)
    assert session.report().kernels == {"dense": 12}


def test_nothing_is_tested_where_torch_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipe = CASE.make()
    vidaccel.patch(pipe, PLAN)
    CASE.run(pipe)
    assert not capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_a_dense_plan_asks_for_nothing() -> None:
    assert requests_of(load_preset("dense"), torch.device("cpu"), torch.float32, 64) == ()
    [request] = requests_of(PLAN, torch.device("cpu"), torch.float32, 64)
    assert request.head_dim == 64 and not request.tail
