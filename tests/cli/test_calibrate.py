"""``vidaccel calibrate``, ``solve`` and ``check`` on a tiny pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vidaccel.configs.artifact import load_plan

CANDIDATES = """
name: few
summary: for tests
tile: [2, 2, 2]
compensations: [none, pooled_tail]
precisions: [native]
patterns:
  - {name: sliding_tile, window: [1, 1, 1]}
  - {name: sliding_tile, window: [1, 1.0, 1.0]}
  - {name: pooled_top_k, density: 0.4}
"""

Run = Callable[..., Any]


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    path = tmp_path / "few.yaml"
    path.write_text(CANDIDATES)
    return path


@pytest.fixture
def common(tiny_model: Path, small: tuple[str, ...], candidates: Path) -> tuple[Any, ...]:
    efforts = ("--bins", 2, "--probes", 4, "--tiles", 4)
    return ("-m", tiny_model, *small, "--candidates", candidates, *efforts)


def test_from_prompts_to_plan_page_and_other_plans(
    vidaccel: Run, common: tuple[Any, ...], tiny_model: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: tmp_path / "costs")
    plan, page, figures = tmp_path / "plan.safetensors", tmp_path / "page.html", tmp_path / "figures.json"
    prompts = ("--prompt", "a red ball", "--prompt", "a blue cat")
    files = ("-o", plan, "--html", page, "--json", figures)
    result = vidaccel("calibrate", *common, *prompts, "--density", 0.6, "--validate", 1, "--check-heads", 3, *files)
    assert "no plan can be faster than" in result.stderr
    made = json.loads(figures.read_text())
    calibration = made["calibration"]
    assert calibration["predicted"]["density"] <= 0.6
    assert calibration["measured"]["density"] == pytest.approx(calibration["predicted"]["density"], abs=0.05)
    assert len(calibration["prediction"]) == 3 and len(made["prompts"]) == 1 and made["prompts"][0]["seed"] == 1000
    assert "data:video/mp4;base64," in page.read_text()
    assert dict(load_plan(plan).provenance)["budget"] == "--density 0.6"

    # others from the same observations, without the model
    observations = plan.with_suffix(".observations.safetensors")
    errors = []
    for density in (0.45, 0.55, 0.65, 0.8, 1.0):
        other = tmp_path / f"{density}.safetensors"
        told = tmp_path / f"{density}.json"
        vidaccel("solve", observations, "--density", density, "-o", other, "--json", told)
        assert load_plan(other).name == str(density)
        errors.append(json.loads(told.read_text())["predicted"]["error"])
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert "least predicted error by cost" in vidaccel("solve", observations).output

    # and checked at another size, where the fingerprint's grid does not fit but the windows carry
    larger = [option.replace("--width=64", "--width=96") for option in small]
    told = tmp_path / "check.json"
    result = vidaccel("check", plan, "-m", tiny_model, *larger, "--prompt", "a red ball", "--json", told)
    assert "heads have drifted" in result.output
    found = json.loads(told.read_text())
    assert found["then"] is not None and found["now"] > 0 and found["heads"]


def test_a_speed_that_no_plan_can_reach_is_refused_before_observing(
    vidaccel: Run, common: tuple[Any, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: tmp_path / "costs")
    plan = tmp_path / "p.safetensors"
    result = vidaccel("calibrate", *common, "-o", plan, "--prompt", "a", "--speedup", 50, code=2)
    assert "asks for more than can be won at this size" in result.stderr and not plan.exists()


def test_what_is_refused(refused: Callable[..., str], common: tuple[Any, ...], tmp_path: Path) -> None:
    out = ("-o", tmp_path / "p.safetensors", "--prompt", "a")
    assert "no budget is given; give one of --speedup, --seconds" in refused("calibrate", *common, *out)
    both = ("--density", 0.5, "--speedup", 2)
    assert "several budgets are given" in refused("calibrate", *common, *out, *both)
    name = refused("calibrate", *common, "-o", tmp_path / "p.yaml", "--prompt", "a", "--density", 0.5)
    assert "does not end in .safetensors" in name
    assert "there are no prompts" in refused("calibrate", *common, "-o", tmp_path / "p.safetensors", "--density", 0.5)
    assert "there is no observations file" in refused("solve", tmp_path / "none.safetensors", "--density", 0.5)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    assert "truncated" in refused("solve", damaged, "--density", 0.5)
    told = refused("calibrate", *common, *out, "--density", 0.5, "--state", damaged)
    assert "truncated" in told and damaged.read_bytes() == b"nothing"
    same = refused("solve", damaged, "--density", 0.5, "-o", damaged)
    assert "is named for two files" in same and damaged.read_bytes() == b"nothing"
    assert "--validate is 0" in refused("calibrate", *common, *out, "--psnr", 30, "--validate", 0)
    assert not (tmp_path / "p.safetensors").exists()
    assert "is dense everywhere" in refused("check", "dense", *common[:7], "--prompt", "a")
