"""``--weights`` of ``vidaccel generate`` and ``compare``: trained parts of a plan's system."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vidaccel.cli.options import read_weight_files
from vidaccel.configs.artifact import save_plan
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, Plan
from vidaccel.errors import ConfigError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A plan with a coarse branch, and gates of the tiny model's two layers of width 32."""
    found = {"plan": tmp_path / "plan.safetensors", "gates": tmp_path / "gates.safetensors"}
    policy = HeadPolicy(PatternSpec.make("pooled_top_k", density=0.3), compensation="coarse")
    save_plan(Plan.uniform("gated", policy), found["plan"])
    save_file({f"blocks.{i}.to_gate_compress.weight": torch.ones(32, 32) for i in range(2)}, found["gates"])
    return found


def test_generate_takes_them(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], files: dict[str, Path], tmp_path: Path
) -> None:
    command = ("generate", "a red ball", "-m", tiny_model, "--plan", files["plan"], *small)
    vidaccel(*command, "--weights", files["gates"], "-o", tmp_path / "gated.mp4")
    report = json.loads((tmp_path / "gated.json").read_text())["report"]
    assert report["sparse_calls"] == 8 and not report["events"]
    assert "has no VSA gates" in vidaccel(*command, "-o", tmp_path / "plain.mp4").stdout


def test_compare_takes_them(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], files: dict[str, Path], tmp_path: Path
) -> None:
    what = ("compare", "-m", tiny_model, "--prompt", "a red ball", "--controls", 0, "--plan", files["plan"], *small)
    vidaccel(*what, "--weights", f"transformer={files['gates']}", "--json", tmp_path / "found.json")
    assert "has no VSA gates" not in (tmp_path / "found.json").read_text()


def test_mistakes(refused: Callable[..., str], tiny_model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    generate = ("generate", "a red ball", "-m", tiny_model, "-o", tmp_path / "out.mp4")
    assert "and there is no none" in refused(*generate, "--weights", "none")
    assert "plan 'sta' uses no trained tensors" in refused(*generate, "--weights", files["gates"])
    twice = ("--weights", files["gates"], "--weights", files["gates"])
    assert "given 2 times; give one path, or one for each transformer" in refused(*generate, *twice)


def test_by_transformer(tmp_path: Path) -> None:
    path = str(tmp_path)
    assert read_weight_files(None) is None and read_weight_files([path]) == path
    both = {"transformer": path, "transformer_2": path}
    assert read_weight_files([f"{name}={path}" for name in both]) == both
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert read_weight_files([str(odd)]) == str(odd)
    for wrong in ([path, f"transformer={path}"], [f"transformer={path}", path], [f"transformer={path}"] * 2):
        with pytest.raises(ConfigError, match="--weights is given 2 times"):
            read_weight_files(wrong)
