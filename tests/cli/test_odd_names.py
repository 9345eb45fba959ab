"""Names that look like markup of rich or formulas of matplotlib are shown as they are, in every command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_wan import tiny_wan
from vidaccel.configs.artifact import save_plan
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, Plan
from vidaccel.pipelines.demo import DEMO_DIR
from vidaccel.types import TileShape

Run = Callable[..., Any]

#: A closing tag that nothing opened (an error for rich), a style, an emoji code, and an error for matplotlib.
ODD = r"my [/bold] [red]plan :dog: $\frac{"
#: Room for every line of a table.
WIDE = {"COLUMNS": "1000", "TERMINAL_WIDTH": "1000"}


@pytest.fixture
def odd_plan(tmp_path: Path) -> Path:
    folder = tmp_path / "[bold]plans"
    folder.mkdir()
    window = PatternSpec.make("sliding_tile", window=[1, 1, 1])
    plan = replace(Plan.uniform(ODD, HeadPolicy(window)), tile=TileShape(2, 2, 2)).with_provenance(author=ODD)
    save_plan(plan, folder / "odd.safetensors")
    return folder / "odd.safetensors"


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "[green]wan"
    tiny_wan(path)
    return path


def test_inspect(vidaccel: Run, odd_plan: Path) -> None:
    shown = vidaccel("inspect", odd_plan, "--grid", "5x3x4", "-o", odd_plan.parent / "map.png", env=WIDE).stdout
    assert f"plan {ODD}" in shown and f"author │ {ODD}" in " ".join(shown.split())
    assert f"written: {odd_plan.parent / 'map.png'}" in shown


def test_generate(vidaccel: Run, odd_plan: Path, odd_model: Path, small: tuple[str, ...]) -> None:
    clip = odd_plan.parent / "clip.mp4"
    told = vidaccel("generate", ODD, "-m", odd_model, "--plan", odd_plan, *small, "-o", clip, env=WIDE).stdout
    assert ODD in told and str(clip) in told
    assert str(odd_model) in clip.with_suffix(".json").read_text(encoding="utf-8")


def test_compare(vidaccel: Run, odd_plan: Path, odd_model: Path, small: tuple[str, ...]) -> None:
    page = odd_plan.parent / "page.html"
    files = ("--html", page, "--html-videos", 0, "--sheet", page.with_suffix(".png"))
    run = ("-m", odd_model, "--plan", odd_plan, "--prompt", ODD, "--controls", 0)
    told = vidaccel("compare", *run, *small, *files, env=WIDE).stdout
    assert f"plan {ODD} against dense" in told and told.count(ODD) >= 2 and f"written: {page}" in told
    assert ODD in page.read_text(encoding="utf-8")


def test_check(vidaccel: Run, odd_plan: Path, odd_model: Path, small: tuple[str, ...]) -> None:
    told = vidaccel("check", odd_plan, "-m", odd_model, "--prompt", ODD, *small, env=WIDE).stdout
    assert told.startswith(f"{ODD}: mean relative error")


def test_solve(vidaccel: Run, tmp_path: Path) -> None:
    kept = next(DEMO_DIR.parent.glob("*.observations.safetensors"))
    observations, plan = tmp_path / "[red]kept.safetensors", tmp_path / f"{ODD.replace('/', ' ')}.safetensors"
    observations.write_bytes(kept.read_bytes())
    told = vidaccel("solve", observations, "--density", 0.5, "-o", plan, env=WIDE).stdout
    assert f"written: {plan}" in told
    assert f"plan {plan.stem}" in vidaccel("inspect", plan, env=WIDE).stdout


def test_demo(vidaccel: Run, odd_plan: Path, monkeypatch: pytest.MonkeyPatch, odd_model: Path) -> None:
    """The shipped model is stood in for by a tiny one: what is shown of it is the same."""
    from vidaccel.cli import options

    original = options.open_pipeline

    def tiny(model: str | None, **how: Any) -> options.Opened:
        sizes = {"height": 48, "width": 64, "num_frames": 17, "num_inference_steps": 2, "max_sequence_length": 16}
        return replace(original(str(odd_model), **how), defaults=sizes)

    monkeypatch.setattr(options, "open_pipeline", tiny)
    clip = odd_plan.parent / "demo.mp4"
    told = vidaccel("demo", "--plan", odd_plan, "--prompt", ODD, "--repeats", 1, "-o", clip, env=WIDE).stdout
    assert f"plan {ODD}" in told and f"{ODD}, seed 0" in told and str(clip) in told


def test_calibrate(vidaccel: Run, odd_plan: Path, odd_model: Path, small: tuple[str, ...], monkeypatch: Any) -> None:
    folder = odd_plan.parent
    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: folder / "costs")
    (folder / "[few].yaml").write_text(
        f"name: '{ODD}'\nsummary: for tests\ntile: [2, 2, 2]\ncompensations: [none]\nprecisions: [native]\n"
        "patterns:\n  - {name: sliding_tile, window: [1, 1, 1]}\n"
    )
    effort = ("--bins", 1, "--probes", 1, "--whole-probes", 1, "--tiles", 2, "--validate", 1, "--density", 0.8)
    run = ("-m", odd_model, *small, "--candidates", folder / "[few].yaml", *effort, "--prompt", ODD)
    plan = folder / f"{ODD.replace('/', ' ')}.safetensors"
    told = vidaccel("calibrate", *run, "-o", plan, env=WIDE).stdout
    assert f"written: {plan}" in told and f"kept: {plan.with_suffix('.observations.safetensors')}" in told
