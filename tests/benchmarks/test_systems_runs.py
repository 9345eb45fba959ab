"""Measuring the systems' table: what is written down, what is run again after a kill, who does what. No generations."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import mask_pictures, system_runs
from benchmarks.precision import GRID, HEAD_DIM, HEADS
from benchmarks.system_knobs import SYSTEMS, TILE, Calls, System, plan_of
from benchmarks.system_runs import kernel_for, measure
from benchmarks.system_store import Cell, Store, family, read_rows
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import Plan
from vidaccel.configs.presets import load_preset
from vidaccel.errors import ConfigError
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import select
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Heads, build_pattern
from vidaccel.patterns.registry import pattern_class
from vidaccel.types import PRECISIONS


class Killed(Exception):
    """The process ends."""


class Pretended:
    """A model whose runs keep a little more than the pattern says, and which may be killed after some runs."""

    def __init__(self, runs: int = 1000) -> None:
        self.requests = [SimpleNamespace(prompt=f"prompt {number}", seed=number) for number in range(3)]
        self.left, self.ran = runs, []

    calls = property(lambda self: _Straight([]))

    def run(self, plan: Plan, number: int, kernel: str | None) -> dict[str, Any]:
        if not self.left:
            raise Killed
        self.left -= 1
        (head,) = plan.rules[-1].policy.heads
        self.ran.append((str(head), number))
        density = 1.1 * float(head.pattern.kwargs.get("density", 1.0))  # type: ignore[arg-type]
        figures = dict.fromkeys(("psnr", "ssim", "flicker", "latent_error"), 20.0 + number)
        seconds = {"planning_seconds": 0.1, "attention_seconds": 1.0, "seconds": 2.0}
        return {**figures, **seconds, "density": density, "sparse_density": density, "kernels": {}}


class _Straight(Calls):
    def knob(self, system: System, aimed: float, *, rounds: int = 12) -> float:
        return round(aimed, 4)

    def density(self, system: System, knob: float) -> float:
        return knob


CELLS = [Cell(name, aimed) for aimed in (0.5, 0.2) for name in ("vsa-free", "hip")]
ALL = [*CELLS, Cell("hip", 0.5, "int8")]


def run(path: Path, model: Pretended, cells: list[Cell] | None = None) -> Store:
    store = Store(path, {"model": "pretended"})
    measure(model, ALL if cells is None else cells, store, limits=lambda _: 3, tell=lambda _: None)  # type: ignore[arg-type]
    return store


def test_the_run_that_matched_is_the_first_prompts_own(tmp_path: Path) -> None:
    """Two runs find the knob, the second is kept as prompt 0, and two more prompts follow."""
    model = Pretended()
    store = run(tmp_path / "r.json", model, CELLS[:1])
    assert [number for _, number in model.ran] == [0, 0, 1, 2]
    assert [row["seed"] for row in store.rows] == [0, 1, 2]
    assert all(row["sparse_density"] == pytest.approx(0.5, rel=0.02) for row in store.rows)
    assert len(store.knobs["vsa-free|own|0.5"]) == 2


@pytest.mark.parametrize("runs", range(0, 19, 3))
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, runs: int) -> None:
    """Whatever was written down is not run again, and the result is that of a run that nobody killed."""
    whole = run(tmp_path / "whole.json", Pretended()).rows
    path = tmp_path / "killed.json"
    model = Pretended(runs)
    with pytest.raises(Killed):
        run(path, model)
    written = len(json.loads(path.read_text())["rows"]) if path.exists() else 0
    again = Pretended()
    rows = run(path, again).rows
    assert rows == whole
    assert len(again.ran) <= len(whole) - written + 4  # four knobs cost one run more each, and the killed one
    nothing_left = Pretended(0)
    assert run(path, nothing_left).rows == whole


def test_shards_write_their_own_files_and_are_read_together(tmp_path: Path) -> None:
    first, second, whole = (tmp_path / name for name in ("r-1of2.json", "r-2of2.json", "r.json"))
    run(first, Pretended(), CELLS[:2])
    model = Pretended()
    run(second, model, CELLS)  # finds the first one's rows
    assert model.ran and all("density=0.5" not in head and "density=0.4" not in head for head, _ in model.ran)
    assert len(json.loads(second.read_text())["rows"]) == 6
    assert family(whole) == family(first) == [first, second]
    rows = read_rows([whole])
    assert len(rows) == 12 and len({(row["system"], row["aimed"], row["seed"]) for row in rows}) == 12
    (tmp_path / "r-other.json").write_text("{}")
    assert family(whole) == [first, second]


def test_files_of_another_protocol_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run(path, Pretended(), CELLS[:1])
    with pytest.raises(ConfigError, match="measured by another protocol"):
        Store(path, {"model": "another"})
    with pytest.raises(ConfigError, match="measure first"):
        read_rows([tmp_path / "none.json"])


def test_quantised_cells_have_the_native_knob(tmp_path: Path) -> None:
    store = run(tmp_path / "r.json", Pretended())
    by_precision = {row["precision"]: row for row in store.rows if (row["system"], row["aimed"]) == ("hip", 0.5)}
    assert by_precision["int8"]["knob"] == by_precision["native"]["knob"]
    assert by_precision["int8"]["policy"].endswith(" int8 + pooled_tail")


def test_a_system_without_a_knob_is_not_searched(tmp_path: Path) -> None:
    """Dense attention in 8 bits is run for each prompt, and never in the model's own precision."""
    model = Pretended()
    run(tmp_path / "r.json", model, [Cell("dense", 1.0, "int8")])
    assert model.ran == [("dense int8", number) for number in range(3)]


@pytest.mark.parametrize("precision", ["native", "int8", "fp8-tile"])
@pytest.mark.parametrize("name", ["dense", "vsa-free"])
def test_a_kernel_is_found_for_each_precision(name: str, precision: str) -> None:
    """A session with it makes nothing fall back."""
    kernel = kernel_for(plan_of(SYSTEMS[name], 0.3, precision=precision))
    request = KernelRequest("cpu", torch.float32, HEAD_DIM, PRECISIONS[precision], tail=name != "dense")
    assert select(request, prefer=kernel).why_not(request) is None
    assert kernel is None or precision != "native"


def test_planning_is_timed_once_and_undone() -> None:
    """A pattern that asks another of the same plan is one choice; afterwards the classes are as they were."""
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.of(GRID, TILE)
    q, k, v = (torch.randn(1, layout.tokens, 1, HEAD_DIM, generator=generator) for _ in range(3))
    plan = load_preset("vsa-free")
    spec = plan.rules[-1].policy.heads[0].pattern
    own = pattern_class(spec).choose  # type: ignore[attr-defined]
    with system_runs._planning(plan) as watch:
        pattern: Any = build_pattern(spec)
        pattern.choose(Heads(q, k, v, layout))
        once = watch.seconds
        assert once > 0
    pattern.choose(Heads(q, k, v, layout))
    assert watch.seconds == once and pattern_class(spec).choose is own  # type: ignore[attr-defined]


def test_pictures_show_what_is_kept(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.of(GRID, TILE)
    call = tuple(torch.randn(1, layout.tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    panels = mask_pictures.static_panels()
    assert all(set(panel.cells.flatten()) <= {0.0, 0.45, 1.0} and panel.cells.diagonal().all() for panel in panels)
    assert [panel.title for panel in panels if 0.45 in panel.cells] == ["gna, exact"]
    exact = mask_pictures.attention_of_blocks(call[0][0, :, 0], call[1][0, :, 0], layout)
    assert exact.sum(1) == pytest.approx(1.0)
    path = tmp_path / "masks.png"
    mask_pictures.draw(path, "title", panels)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 300_000


def test_blocks_of_the_clusters_own_sizes_are_drawn_by_their_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.of(GRID, TILE)
    heads = Heads(*(torch.randn(1, layout.tokens, 1, 16, generator=generator) for _ in range(3)), layout)
    spec = PatternSpec.make("svg_ear", density=0.3, exact=True, first=2)
    panel = mask_pictures._panel("clusters", *mask_pictures._mask(spec, heads))
    assert panel.cells.shape == (576, 576)
    assert panel.cells.mean() == pytest.approx(0.3, abs=0.01) and panel.note.startswith("density 0.30, holds 0.3")
