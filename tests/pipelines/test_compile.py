"""torch.compile of the repeated blocks: one graph, no recompilation over layers, steps, policies and guidance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vidaccel
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape

pytestmark = pytest.mark.full

WINDOW = LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),))
#: Another policy in every step, layer and branch: whatever leaks into the graph would recompile it.
CHANGING = Plan(
    "changing",
    (
        Rule(LayerPolicy(), noise=(0.9, 1.0)),
        Rule(WINDOW, layers=(1,)),
        Rule(LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 2, 1])),)), branch="uncond"),
        Rule(WINDOW),
    ),
    tile=TileShape(2, 2, 2),
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WITH_VECTORS = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="inductor makes no code for a CPU without vector units"
)


@pytest.mark.parametrize(
    ("first", "backend"), [pytest.param("patch", "inductor", marks=WITH_VECTORS), ("compile", "aot_eager")]
)
def test_one_graph_no_recompiles(first: str, backend: str) -> None:
    eager = CASES[0].make()
    vidaccel.patch(eager, CHANGING)
    expected = CASES[0].run(eager)

    pipe = CASES[0].make()
    counter = CompileCounterWithBackend(backend)
    if first == "patch":
        session = vidaccel.patch(pipe, CHANGING, strict=True)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    if first == "compile":
        session = vidaccel.patch(pipe, CHANGING, strict=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = CASES[0].run(pipe)
        again = CASES[0].run(pipe, prompt="a green square")
    assert counter.frame_count == 1
    assert_rounded(found, expected, bound_of_case(CASES[0]))
    assert not torch.equal(found, again)
    report = session.report()
    assert report.calls == 24 and 0 < report.sparse_calls < 24
