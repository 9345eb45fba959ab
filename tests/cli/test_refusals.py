"""Refusals that help: the name that was meant, what was typed, and outputs that would destroy an input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vidaccel.configs.artifact import save_plan
from vidaccel.configs.presets import load_preset
from vidaccel.pipelines.demo import DEMO_DIR

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some inputs in a folder to work in, where loading a model is a failure."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    save_plan(load_preset("sta"), "plan.safetensors")
    Path("prompts.txt").write_text("a cat\n")
    Path("ratios.json").write_text("[1.0, 0.9]")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("generate cat --plan stta", "sta"),
        ("generate cat --cache first-blok:0.08", "first-block"),
        ("generate cat --dtype float23", "float32"),
        ("calibrate --prompt cat --density .5 --candidates cpuu", "cpu"),
        ("calibrate --prompt cat --speedup 2 --caches none,taylorser:3", "taylorseer"),
        ("check radal --prompt cat", "radial"),
    ],
)
def test_the_name_that_was_meant(refused: Refused, typed: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refused(*typed.split())


@pytest.mark.parametrize(
    "typed",
    [
        "check plan.safetensors --prompt cat --json plan.safetensors",
        "check sta --prompts prompts.txt --json prompts.txt",
        "compare --prompts prompts.txt --json prompts.txt",
        "compare --prompt cat --cache mag:ratios.json --json ratios.json",
        "calibrate --density .5 --prompts prompts.txt --json ./prompts.txt",
        "generate cat --cache mag:ratios.json -o ratios.mp4",
    ],
)
def test_no_output_is_written_over_an_input(refused: Refused, typed: str, here: Path) -> None:
    before = {path: path.read_bytes() for path in here.iterdir()}
    assert "is a file that this command reads; give it another name" in refused(*typed.split())
    assert {path: path.read_bytes() for path in here.iterdir()} == before


@pytest.mark.parametrize("words", [("--height", "17.5"), ("--num_frames=many",), ("--seed", "9" * 20)])
def test_what_was_typed_is_told(refused: Refused, words: tuple[str, ...]) -> None:
    value = words[-1].removeprefix("--num_frames=")
    assert value in refused("generate", "cat", *words)


def test_options_before_the_command_end_alike(refused: Refused) -> None:
    assert refused("--bogus") == "No such option: --bogus; see vidaccel --help"


def test_a_dense_plan_has_nothing_to_check(refused: Refused) -> None:
    assert "is dense everywhere, so there is nothing to check" in refused("check", "dense", "--prompt", "cat")


def test_a_part_of_a_pipeline_points_to_the_folder_above(refused: Refused) -> None:
    assert "give the folder above it" in refused("generate", "cat", "-m", DEMO_DIR / "transformer")
