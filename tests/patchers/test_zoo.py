"""Every pipeline of every family: dense is untouched, sparse equals the oracle in the same model, undo is exact."""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import ExitStack
from typing import Any

import diffusers
import pytest
import torch

import tests.zoo
import vidaccel
from tests.rounding import assert_rounded, bound_of, distance
from tests.zoo.case import Case
from tests.zoo.oracle import masked
from tests.zoo.watch import video_calls
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.pipelines.patch import find_transformers

TILE = TileShape(2, 2, 2)  # ragged on every axis of the zoo's grids
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])
ALIKE = Plan("alike", (Rule(LayerPolicy((HeadPolicy(WINDOW),))),), tile=TILE)


#: An older diffusers (``make test-diffusers``) has only some of the zoo.
OLDER = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 42)


def zoo() -> list[Case]:
    cases: list[Case] = []
    for found in pkgutil.iter_modules(tests.zoo.__path__):
        try:
            module = importlib.import_module(f"tests.zoo.{found.name}")
        except ImportError:
            if not OLDER:
                raise
            continue
        cases += getattr(module, "CASES", ())
    return [case for case in cases if not OLDER or hasattr(diffusers, case.pipeline.split("-")[0])]


CASES = zoo()
#: The first of each file of cases runs for every change, the others in ``make test``.
_FIRST = {case.build.__module__: case for case in reversed(CASES)}


def tiered(cases: list[Case]) -> list[Any]:
    """Parameters of a test."""
    return [
        pytest.param(case, marks=[pytest.mark.full] * (case not in _FIRST.values()), id=str(case)) for case in cases
    ]


SPARSE = [case for case in CASES if case.sparse]
#: Their original processors build a mask of all token pairs; ours gives the kernel the same rule in another form.
OTHER_MASK = ("HunyuanVideo15",)


def test_the_zoo_is_there() -> None:
    """A file of cases that an older diffusers cannot import is left out; most must not be."""
    assert len(CASES) >= (42 if OLDER else 65) and len(SPARSE) >= (41 if OLDER else 60)


def per_head(pipe: Any) -> Plan:
    """Heads with different windows, one of them dense."""
    _, model, family = find_transformers(pipe)[0]
    (_, module), *_ = family.attention_layers(model)
    heads = family.heads_of(module)
    wide = PatternSpec.make("sliding_tile", window=[2, 1, 2])
    choices = [HeadPolicy(WINDOW), HeadPolicy(), HeadPolicy(wide)]
    return Plan("per-head", (Rule(LayerPolicy(tuple(choices[i % 3] for i in range(heads)))),), tile=TILE)


def oracle_run(case: Case, plan: Plan | None = None, **overrides: Any) -> torch.Tensor:
    pipe = case.make()
    with ExitStack() as stack:
        for _, model, family in find_transformers(pipe):
            stack.enter_context(masked(family, model, plan or per_head(pipe)))
        return case.run(pipe, **overrides)


def same(case: Case, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, or where the mask has another form, as far as rounding goes."""
    if case.pipeline.startswith(OTHER_MASK):
        return distance(found, expected) <= bound_of(lambda: case.run(case.make()), expected)
    return torch.equal(found, expected)


@pytest.mark.parametrize("case", tiered(CASES))
def test_dense_plan_and_undo(case: Case) -> None:
    pipe = case.make()
    with video_calls([model for _, model, _ in find_transformers(pipe)]) as called:
        before = case.run(pipe)
    assert torch.isfinite(before).all()
    processors = {id(module): module.processor for module in layers(pipe)}
    session = vidaccel.patch(pipe, "dense")
    assert same(case, case.run(pipe), before)
    report = session.report()
    assert report.calls == len(called) > 0, "every video self-attention of the unpatched model is ours, and no other"
    assert report.sparse_calls == 0 and report.density == 1.0 and not report.fallbacks
    vidaccel.unpatch(pipe)

    session = vidaccel.patch(pipe, ALIKE)
    found = case.run(pipe)
    assert same(case, found, before) != case.sparse
    if not case.sparse:
        assert any(case.reason in reason for reason in session.report().fallbacks)
    vidaccel.unpatch(pipe)
    assert torch.equal(case.run(pipe), before)
    assert all(module.processor is processors[id(module)] for module in layers(pipe))


def layers(pipe: Any) -> list[Any]:
    return [module for _, model, family in find_transformers(pipe) for _, module in family.attention_layers(model)]


@pytest.mark.parametrize("case", tiered(SPARSE))
def test_sparse_equals_the_oracle(case: Case) -> None:
    pipe = case.make()
    plan = per_head(pipe)
    session = vidaccel.patch(pipe, plan, strict=True)
    found = case.run(pipe)
    expected = oracle_run(case)
    assert_rounded(found, expected, bound_of(lambda: oracle_run(case), expected))
    report = session.report()
    assert report.calls == report.sparse_calls > 0 and not report.fallbacks
    calls = {entry["calls"] for entry in report.layers}
    assert len(calls) <= len(find_transformers(pipe)), "every layer of a transformer is called equally often"


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in SPARSE if case.two], ids=str)
def test_two_prompts(case: Case) -> None:
    assert case.two is not None
    expected = oracle_run(case, **case.two())
    pipe = case.make()
    vidaccel.patch(pipe, per_head(pipe), strict=True)
    found = case.run(pipe, **case.two())
    bound = bound_of(lambda: oracle_run(case, **case.two()), expected)  # type: ignore[misc]
    assert_rounded(found, expected, bound)
    assert found.shape[0] == 2 and distance(found[0], found[1]) > 100 * bound


@pytest.mark.skipif(OLDER, reason="needs the newest diffusers")
def test_a_model_with_sparse_attention_of_its_own_is_left_to_it() -> None:
    """Kandinsky 5's NABLA passes a FlexAttention mask; the call never reaches our operator, and the report says so."""
    from tests.zoo import kandinsky

    def make() -> Any:
        pipe = next(case for case in kandinsky.CASES if case.pipeline == "Kandinsky5T2VPipeline").make()
        config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
        config |= {"attention_type": "nabla", "attention_P": 0.9, "attention_wT": 3, "attention_wW": 1}
        config |= {"attention_wH": 1, "attention_add_sta": True, "attention_method": "topcdf"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe.register_modules(transformer=type(pipe.transformer)(**config).eval())
        pipe.transformer.set_attention_backend("flex")
        return pipe

    call = kandinsky.CASES[0].call
    size = {"height": 128, "width": 256}
    pipe = make()
    expected = kandinsky.CASES[0].run(pipe, **size)
    session = vidaccel.patch(pipe, ALIKE)
    assert torch.equal(kandinsky.CASES[0].run(pipe, **size), expected)
    report = session.report()
    assert report.calls > 0 and report.sparse_calls == 0
    assert sum(report.fallbacks.values()) == report.calls
    assert all("NABLA" in reason for reason in report.fallbacks)
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, ALIKE, strict=True)
    with pytest.raises(vidaccel.StrictError, match="NABLA"):
        pipe(**{**call(), **size})
