"""Measured costs: what is timed, how disturbances cancel, and what is found again on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from vidaccel.calibration import bench, cost_store
from vidaccel.calibration.cost import Costs, cost_cache, measure_costs
from vidaccel.compensation import Call, Compensation
from vidaccel.compensation import registry as compensations
from vidaccel.configs import HeadPolicy, LayerPolicy, PatternSpec
from vidaccel.errors import ConfigError, KernelError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import registry
from vidaccel.patterns.dynamic import DynamicPattern, Heads, choose_blocks
from vidaccel.types import TileShape, VideoGrid

LAYOUT = TokenLayout.of(VideoGrid(4, 4, 4), TileShape(2, 2, 2), text_tokens=3)
COLUMN = HeadPolicy(PatternSpec.make("sliding_tile", window=(1.0, 0.1, 0.1)))
PLANE = HeadPolicy(PatternSpec.make("sliding_tile", window=(0.1, 1.0, 1.0)), compensation="pooled_tail")
WHOLE = HeadPolicy(PatternSpec.make("sliding_tile", window=(1.0, 1.0, 1.0)))
POLICIES = [HeadPolicy(), COLUMN, PLANE, WHOLE]


def measure(policies: list[HeadPolicy], **changed: Any) -> Costs:
    given = {"heads": 2, "head_dim": 8, "batch": 1, "dtype": torch.float32, "device": "cpu", "budget_seconds": 0.0}
    return measure_costs(policies, LAYOUT, **{**given, **changed})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that were timed, in order; dense takes 8 s, sparse 2 s, and every other dense call all doubles."""
    calls: list[str] = []

    def seconds(run: bench.Run, device: torch.device) -> float:
        run.go()
        calls.append("dense" if run.go.__name__ == "dense" else "sparse")
        slow = 1 + calls.count("dense") % 2
        return slow * (8.0 if calls[-1] == "dense" else 2.0)

    monkeypatch.setattr(bench, "_seconds", seconds)
    monkeypatch.setattr(bench, "_MIXES", 0)
    return calls


def test_real_kernels_are_timed(tmp_path: Path) -> None:
    found = measure(POLICIES, cache=tmp_path)
    assert found.origin == "measured" and "threads" in found.device
    assert set(found.table) == {COLUMN, PLANE, WHOLE}
    assert found.seconds(HeadPolicy()) == found.dense > 0
    assert found.seconds(WHOLE) == found.dense  # keeps every block, so it runs as dense attention
    assert 0 < found.best_ratio <= 1 and found.mixing != 0.0


def test_disturbances_cancel(timed: list[str]) -> None:
    """A busy moment lengthens both calls; their ratio stays."""
    found = measure([COLUMN, PLANE], budget_seconds=math.inf)
    assert timed.count("sparse") == 30 and timed.count("dense") == 15
    assert timed[:3] == ["dense", "sparse", "sparse"]
    assert found.seconds(COLUMN) == found.seconds(PLANE) == found.dense / 4
    assert found.best_ratio == 0.25


def test_the_first_round_always_runs(timed: list[str]) -> None:
    measure([COLUMN, PLANE], budget_seconds=0.0)
    assert timed == ["dense", "sparse", "sparse"]


def test_dense_is_never_long_ago(timed: list[str]) -> None:
    tails = [replace(COLUMN, compensation="pooled_tail"), replace(PLANE, compensation="none")]
    wide = HeadPolicy(PatternSpec.make("sliding_tile", window=(1.0, 1.0, 0.1)))
    measure([COLUMN, PLANE, *tails, wide])
    assert timed == ["dense", *["sparse"] * 4, "dense", "sparse"]


def test_only_what_is_new_is_measured(timed: list[str], tmp_path: Path) -> None:
    first = measure([COLUMN], cache=tmp_path)
    assert timed == ["dense", "sparse"]
    assert measure([COLUMN], cache=tmp_path) == first and len(timed) == 2
    both = measure([COLUMN, PLANE, PLANE], cache=tmp_path)
    assert timed == ["dense", "sparse"] * 2
    assert both.dense == first.dense and both.seconds(COLUMN) == first.seconds(COLUMN)
    assert both.seconds(PLANE) == both.dense / 4  # a ratio to the dense time of the file, though dense took half now
    assert measure([PLANE, COLUMN], cache=tmp_path).table == both.table and len(timed) == 4
    for other in ({"heads": 1}, {"batch": 2}, {"head_dim": 16}, {"dtype": torch.bfloat16}):
        before = len(timed)
        measure([COLUMN], cache=tmp_path, **other)
        assert len(timed) == before + 2, other
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert content["versions"]["torch"] == torch.__version__ and len(content["entries"]) == 5
    assert "4x4x4 + 3 text last, tile 2x2x2, batch 1, 2 heads of 8, float32" in content["entries"]


def test_versions_and_threads_have_files_of_their_own(
    timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure([COLUMN], cache=tmp_path)
    monkeypatch.setattr(cost_store, "__version__", "999")
    measure([COLUMN], cache=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert ", 77 threads" in measure([COLUMN], cache=tmp_path).device
    assert len(list(tmp_path.iterdir())) == 3 and len(timed) == 6


@pytest.mark.parametrize("text", ["", "[]", '{"entries": 3}', '{"entries": {"a": 3}}', "{"], ids=repr)
def test_a_damaged_cache_is_named(text: str, tmp_path: Path, timed: list[str]) -> None:
    measure([COLUMN], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"the file of measured costs {file} cannot be used .*; delete it"):
        measure([COLUMN], cache=tmp_path)
    assert file.read_text() == text


def test_a_damaged_entry_is_named(tmp_path: Path, timed: list[str]) -> None:
    measure([COLUMN], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    (key,) = content["entries"]
    file.write_text(json.dumps({**content, "entries": {key: {"dense": 1.0}}}))
    with pytest.raises(ConfigError, match="has another form"):
        measure([COLUMN], cache=tmp_path)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_cache() == tmp_path / "vidaccel" / "costs" and not cost_cache().exists()


def test_what_no_kernel_runs_raises() -> None:
    with pytest.raises(KernelError, match="no kernel runs precision 'int8'"):
        measure([replace(COLUMN, precision="int8")], dtype=torch.float64)


def test_mixed_layers_cost_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Alone COLUMN takes .25 of dense and PLANE .75, any mixture .2 more than the mean of its members."""
    alone = {HeadPolicy(): 1.0, COLUMN: 0.25, PLANE: 0.75}

    def call(layer: LayerPolicy, *rest: object) -> bench.Run:
        mean = sum(alone[head] for head in layer.heads) / len(layer.heads)
        return bench.Run(lambda: mean if layer.is_uniform else mean + 0.2)

    monkeypatch.setattr(bench, "_call", call)
    monkeypatch.setattr(bench, "_seconds", lambda run, device: 10.0 * (1.0 if run.go.__name__ == "dense" else run.go()))
    found = measure([COLUMN], cache=tmp_path)
    assert found.mixing == pytest.approx(2.0)
    assert found.layer([COLUMN, COLUMN]) == found.seconds(COLUMN) == 2.5
    assert found.layer([COLUMN, HeadPolicy()]) == pytest.approx((2.5 + 10) / 2 + 2.0)
    assert measure([COLUMN, PLANE], cache=tmp_path).mixing == found.mixing
    assert measure([], cache=tmp_path / "other").mixing == 0.0  # nothing to mix, so nothing is kept either
    later = measure([COLUMN, PLANE], cache=tmp_path / "other")
    assert later.mixing == pytest.approx(2.0) and later.layer([PLANE, COLUMN]) == pytest.approx(7.0)


def test_mixtures_share_a_precision() -> None:
    policies = [COLUMN, PLANE, replace(COLUMN, precision="int8"), HeadPolicy(precision="int8")]
    found = bench._mixes(policies, heads=3)
    assert found and all(len(mixed) == 3 and len({p.precision for p in mixed}) == 1 for mixed in found)
    assert {p.precision for mixed in found for p in mixed} == {"native", "int8"}
    assert bench._mixes(policies, heads=1) == bench._mixes([], heads=4) == []


@dataclass(frozen=True, kw_only=True, eq=False)
class _Own(DynamicPattern):
    """Each block of the video keeps itself."""

    name: ClassVar[str] = "own_block"

    def choose(self, heads: Heads) -> torch.Tensor:
        assert heads.memory == {}
        heads.memory["seen"] = True
        blocks = heads.layout.num_video_blocks
        return torch.eye(blocks, dtype=torch.bool).expand(heads.q.shape[0], heads.q.shape[2], -1, -1)

    def resolved(self, layout: TokenLayout) -> str:
        return "one block"


def test_run_time_patterns_choose_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.Tensor] = []

    def choose(pattern: DynamicPattern, heads: Heads) -> torch.Tensor:
        chosen.append(choose_blocks(pattern, heads))
        return chosen[-1]

    monkeypatch.setattr(bench, "_MIXES", 0)
    monkeypatch.setitem(registry._PATTERNS, "own_block", _Own)
    monkeypatch.setattr("vidaccel.patterns.dynamic.choose_blocks", choose)
    routed = HeadPolicy(PatternSpec.make("own_block"), compensation="pooled_tail")
    assert measure([routed]).seconds(routed) > 0
    assert [tuple(blocks.shape) for blocks in chosen] == [(1, 2, 9, 9)] * 2  # warm-up and one round


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reminded(Compensation):
    """Notes in each call how many there were before in this generation."""

    name: ClassVar[str] = "reminded"
    stateful: ClassVar[bool] = True
    seen: ClassVar[list[int]] = []

    def attend(self, call: Call) -> torch.Tensor:
        number = call.memory.get("number", 0)
        self.seen.append(number)
        call.memory["number"] = number + 1
        return call.sparse()


def test_what_remembers_is_timed_over_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_MIXES", 0)
    monkeypatch.setitem(compensations._REGISTRY.known, "reminded", _Reminded)
    _Reminded.seen.clear()
    policy = replace(COLUMN, compensation="reminded")
    assert measure([policy]).seconds(policy) > 0
    assert _Reminded.seen == list(range(12)) * 2  # warm-up and one round


def test_round_trip() -> None:
    found = Costs("a device", "predicted", 2.0, {COLUMN: 0.5, PLANE: 3.0}, -0.25)
    assert Costs.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.best_ratio == 0.25
    assert replace(found, table={PLANE: 3.0}).best_ratio == 1.0  # dense attention is a candidate too
    with pytest.raises(ConfigError, match=r"the cost of sliding_tile\(.*\) on a device is not known; measure"):
        found.seconds(WHOLE)
    assert found.layer([COLUMN, HeadPolicy()]) == 1.0
    with pytest.raises(ConfigError, match="a layer has no policies"):
        found.layer([])


def test_mistakes_are_named() -> None:
    good = Costs("a device", "predicted", 2.0, {COLUMN: 0.5}).to_dict()
    for wrong, says in (
        ({**good, "more": 1}, "unknown keys more"),
        ({"device": "a"}, "lack one of device, origin, dense, mixing, seconds"),
        ({**good, "seconds": 3}, "seconds is no list"),
        ({**good, "seconds": [{"seconds": 3.0}]}, "lacks its policy or its seconds"),
        ({**good, "dense": "1"}, "a cost is '1'; give seconds above 0"),
        ({**good, "dense": 0.0}, "a cost is 0.0"),
        ({**good, "dense": math.inf}, "a cost is inf"),
        ({**good, "mixing": None}, "Costs.mixing is None; give a finite number"),
        ({**good, "origin": "guessed"}, "Costs.origin is 'guessed'; valid are measured, predicted"),
        (3, "the costs is 3"),
    ):
        with pytest.raises(ConfigError, match=says):
            Costs.from_dict(wrong)
