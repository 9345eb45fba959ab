"""``vidaccel inspect``: presets and plan files, tables and heat-map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from vidaccel.configs.artifact import save_plan
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.configs.presets import preset_names
from vidaccel.types import VideoGrid


@pytest.mark.full
@pytest.mark.parametrize("name", preset_names())
def test_presets(vidaccel: Callable[..., Any], tmp_path: Path, name: str) -> None:
    result = vidaccel("inspect", name, "--grid", "8x12x12", "--layers", 4, "--heads", 2, "-o", tmp_path / "map.png")
    assert f"plan {name}" in result.stdout and "any model" in result.stdout
    assert ("noise level" in result.stdout) and ("8x12x12 tokens in" in result.stdout)
    assert cv2.imread(str(tmp_path / "map.png")) is not None


def test_a_file_is_shown_for_what_it_was_made_for(vidaccel: Callable[..., Any], tmp_path: Path) -> None:
    narrow = HeadPolicy(PatternSpec.make("neighborhood", window=(1, 3, 3)))
    rule = Rule(LayerPolicy((narrow, HeadPolicy())), noise=(0.0, 0.5), layers=(1, 2), branch="cond")
    made_for = Fingerprint(model_class="WanTransformer3DModel", heads=2, layers=4, grid=VideoGrid(4, 6, 6))
    save_plan(Plan("mine", (rule,), fingerprint=made_for).with_provenance(author="me"), tmp_path / "mine.safetensors")
    shown = vidaccel("inspect", tmp_path / "mine.safetensors", env={"COLUMNS": "200"}).stdout
    for words in ("plan mine", "WanTransformer3DModel", "4x6x6 tokens", "author", "0 to 0.5", "1-2", "cond"):
        assert words in shown, words
    assert "1 heads: neighborhood(window=(1, 3, 3))" in shown


def test_bad_input_is_one_sentence(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "presets are" in refused("inspect", "no-such-preset")
    assert "gone.safetensors" in refused("inspect", tmp_path / "gone.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"not a plan")
    assert "other.safetensors" in refused("inspect", tmp_path / "other.safetensors")
    assert "for example 21x30x52" in refused("inspect", "sta", "--grid", "21x30")
    assert "whole number of at least 1" in refused("inspect", "sta", "--grid", "0x2x2")
    assert "does not end in .png" in refused("inspect", "sta", "--grid", "4x4x4", "-o", tmp_path / "map.jpg")
    assert "create it first" in refused("inspect", "sta", "-o", tmp_path / "no" / "map.png")
