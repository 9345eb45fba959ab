"""The examples of docs/CONTRIBUTING.md, run as they stand there: a pattern or a compensation is one file."""

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
from vidaccel.compensation import registry as compensations
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_static, registry

TEXT = (Path(__file__).parents[2] / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# vidaccel/(\w+)/(\w+)\.py\n(.*?)```", TEXT, re.S)


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the files as modules of the package, and forgets what they register afterwards."""
    tables = (registry._PATTERNS, compensations._REGISTRY.known)
    known = [dict(table) for table in tables]
    for folder, name, code in BLOCKS:
        module = ModuleType(f"vidaccel.{folder}.{name}")
        module.__package__ = f"vidaccel.{folder}"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, f"{name}.py", "exec"), vars(module))
    yield
    for table, before in zip(tables, known, strict=True):
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]


def test_all_examples_are_there() -> None:
    assert [f"{folder}/{name}" for folder, name, _ in BLOCKS] == [
        "patterns/same_row", "patterns/nearest", "compensation/mean_value",
    ]  # fmt: skip


def test_the_static_example_is_its_formula() -> None:
    layout = TokenLayout.of(VideoGrid(2, 6, 3), TileShape(1, 1, 3))  # a block is one row of one frame
    keep = build_static(PatternSpec.make("same_row", reach=2)).blocks(layout)
    row = torch.arange(layout.num_blocks) % 6
    assert torch.equal(keep, (row[:, None] - row[None, :]).abs() <= 2)


ROW, NEAREST = PatternSpec.make("same_row", reach=1), PatternSpec.make("nearest", count=2)


@pytest.mark.parametrize(
    "policy",
    [
        HeadPolicy(ROW, compensation="pooled_tail"),
        HeadPolicy(NEAREST, compensation="pooled_tail"),
        HeadPolicy(NEAREST, compensation=CompensationSpec.make("mean_value", share=0.2)),
    ],
    ids=str,
)
def test_they_run_in_a_pipeline(policy: HeadPolicy) -> None:
    pipe = CASES[0].make()
    session = vidaccel.patch(
        pipe, Plan("example", (Rule(LayerPolicy((policy,))),), tile=TileShape(1, 1, 2)), strict=True
    )
    assert torch.isfinite(CASES[0].run(pipe)).all()
    report = session.report()
    assert report.sparse_calls == report.calls and report.density is not None and report.density < 1
