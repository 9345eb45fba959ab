"""The examples of docs/CONTRIBUTING.md, run as they stand there: a pattern is one file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vidaccel
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape, VideoGrid
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_static, registry

TEXT = (Path(__file__).parents[2] / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# vidaccel/patterns/(\w+)\.py\n(.*?)```", TEXT, re.S)


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs both files as modules of the package, and forgets their patterns afterwards."""
    known = dict(registry._PATTERNS)
    for name, code in BLOCKS:
        module = ModuleType(f"vidaccel.patterns.{name}")
        module.__package__ = "vidaccel.patterns"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, f"{name}.py", "exec"), vars(module))
    yield
    registry._PATTERNS.clear()
    registry._PATTERNS.update(known)


def test_both_examples_are_there() -> None:
    assert [name for name, _ in BLOCKS] == ["same_row", "nearest"]


def test_the_static_example_is_its_formula() -> None:
    layout = TokenLayout.of(VideoGrid(2, 6, 3), TileShape(1, 1, 3))  # a block is one row of one frame
    keep = build_static(PatternSpec.make("same_row", reach=2)).blocks(layout)
    row = torch.arange(layout.num_blocks) % 6
    assert torch.equal(keep, (row[:, None] - row[None, :]).abs() <= 2)


@pytest.mark.parametrize("spec", [PatternSpec.make("same_row", reach=1), PatternSpec.make("nearest", count=2)])
def test_both_run_in_a_pipeline(spec: PatternSpec) -> None:
    pipe = CASES[0].make()
    policy = HeadPolicy(spec, compensation="pooled_tail")
    session = vidaccel.patch(
        pipe, Plan("example", (Rule(LayerPolicy((policy,))),), tile=TileShape(1, 1, 2)), strict=True
    )
    assert torch.isfinite(CASES[0].run(pipe)).all()
    report = session.report()
    assert report.sparse_calls == report.calls and report.density is not None and report.density < 1
