"""``vidaccel demo`` with the tiny pipeline in place of the shipped model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from vidaccel.configs.artifact import load_plan
from vidaccel.pipelines.demo import DEMO_PLAN, PROMPTS


@pytest.fixture(autouse=True)
def _tiny(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
    monkeypatch.setattr("vidaccel.pipelines.demo.DEMO_DIR", tiny_model)
    monkeypatch.setattr("vidaccel.pipelines.demo.DEFAULTS", defaults)


def test_two_videos_a_sheet_and_a_table(vidaccel: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "outputs" / "demo.mp4"
    result = vidaccel("demo", "--plan", "sta", "-o", out, "--repeats", 1, env={"COLUMNS": "160"})
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["demo-dense.mp4", "demo.json", "demo.mp4", "demo.png"]
    for video in (out, out.with_stem("demo-dense")):
        assert cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT) == 9
    (row,) = json.loads(out.with_suffix(".json").read_text())["prompts"]
    assert row["prompt"] == PROMPTS[0] and row["seed"] == 0
    words = (
        PROMPTS[0],
        "seconds",
        "speed-up",
        f"{row['speedup']['total']:.2f}x",
        "density",
        "PSNR",
        "SSIM",
        "demo.png",
    )
    for word in words:
        assert word in result.stdout, word


def test_the_shipped_plan_is_the_default(vidaccel: Callable[..., Any], tmp_path: Path) -> None:
    """It was made for the shipped model at its own size, and the tiny one is neither."""
    told = vidaccel("demo", "-o", tmp_path / "demo.mp4", code=2).stderr.splitlines()[-1]
    assert told.startswith("error: the plan 'calibrated' does not fit transformer: number of heads is 2")


def test_the_shipped_plan_is_what_the_shipped_observations_give(vidaccel: Callable[..., Any], tmp_path: Path) -> None:
    shipped, again = load_plan(DEMO_PLAN), tmp_path / "again.safetensors"
    words = shlex.split(dict(shipped.provenance)["command"])
    assert words[:3] == ["vidaccel", "solve", "calibrated.observations.safetensors"] and words[-2] == "-o"
    vidaccel("solve", DEMO_PLAN.with_name(words[2]), *words[3:-1], again)
    made = load_plan(again)
    assert made.rules == shipped.rules and made.tile == shipped.tile and made.fingerprint == shipped.fingerprint
    assert made.cache == shipped.cache is not None
    assert any(head.pattern.name != "dense" for rule in made.rules for head in rule.policy.heads)


def test_a_folder_that_cannot_be_made(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    assert "is not a folder; choose another output" in refused("demo", "-o", tmp_path / "outputs" / "sub" / "demo.mp4")
