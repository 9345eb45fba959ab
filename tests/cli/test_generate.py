"""``vidaccel generate`` on a tiny pipeline saved in the real format."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from vidaccel.configs.artifact import save_plan
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.errors import KernelError
from vidaccel.types import TileShape, VideoGrid

WINDOW = HeadPolicy(PatternSpec.make("neighborhood", window=(1.0, 0.5, 0.5)))


def frames_of(path: Path) -> np.ndarray:
    """What OpenCV reads back, [T, H, W, 3] BGR."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        good, frame = capture.read()
        if not good:
            return np.stack(frames)
        frames.append(frame)


def plan_file(path: Path, **fingerprint: Any) -> Path:
    """A plan that is sparse at every noise level."""
    made_for = Fingerprint.make(**fingerprint) if fingerprint else None
    save_plan(Plan("window", (Rule(LayerPolicy((WINDOW,))),), tile=TileShape(1, 1, 2), fingerprint=made_for), path)
    return path


def test_writes_the_video_and_what_made_it(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    plan = plan_file(tmp_path / "window.safetensors")
    out = tmp_path / "ball.mp4"
    result = vidaccel("generate", "a red ball", "-m", tiny_model, "--plan", plan, "--seed", 3, *small, "-o", out)
    assert frames_of(out).shape == (17, 48, 64, 3)
    made = json.loads(out.with_suffix(".json").read_text())
    assert (made["prompt"], made["seed"], made["plan"], made["file"]) == ("a red ball", 3, "window", "ball.mp4")
    assert made["arguments"] == {
        "height": 48, "width": 64, "num_frames": 17, "num_inference_steps": 2, "max_sequence_length": 16,
    }  # fmt: skip
    assert made["frames"] == {"count": 17, "height": 48, "width": 64}
    report = made["report"]
    assert 0 < report["density"] < 1 and report["sparse_calls"] == report["calls"] == 2 * 2 * 2  # layers, steps, cfg
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert made["seconds"]["total"] > 0 and made["machine"]["packages"]["torch"]
    assert f"density {report['density']:.3f}" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ball.json", "ball.mp4", "window.safetensors"]


@pytest.mark.parametrize("plan", ["sta", "radial", "svg-static", "neighborhood"])
def test_every_preset_runs_and_reports(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path, plan: str
) -> None:
    out = tmp_path / "out.mp4"
    longer = ("--height=96", "--width=160", "--num-frames=33")  # a 9x6x10 grid: two of sta's tiles in a row
    result = vidaccel("generate", "a cat", "--model", tiny_model, "--plan", plan, *small, *longer, "-o", out)
    assert f"plan {plan}: " in result.stdout and "density" in result.stdout
    report = json.loads(out.with_suffix(".json").read_text())["report"]
    assert report["sparse_calls"] > 0 and len(report["layers"]) == 2


def test_the_dense_plan_is_the_pipeline_itself(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    """Same settings in Python without vidaccel, written by the same writer: the same file."""
    import torch

    from vidaccel.pipelines.load import load_pipeline
    from vidaccel.pipelines.video import to_frames, write_video

    out = tmp_path / "out.mp4"
    vidaccel("generate", "a cat", "-m", tiny_model, "--plan", "dense", "--seed", 5, *small, "--dtype=fp32", "-o", out)
    pipe = load_pipeline(tiny_model, dtype=torch.float32, device=torch.device("cpu"))
    settings = json.loads(out.with_suffix(".json").read_text())["arguments"]
    plain = pipe("a cat", generator=torch.Generator().manual_seed(5), output_type="np", **settings).frames[0]
    write_video(tmp_path / "plain.mp4", to_frames(plain), fps=16)
    assert np.array_equal(frames_of(out), frames_of(tmp_path / "plain.mp4"))


def test_prompt_as_option_and_flags_with_underscores(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    spelled = [option.replace("-", "_").replace("__", "--", 1) for option in small]
    assert spelled[2] == "--num_frames=17"
    options = ("--negative_prompt", "blue", "--guidance_scale", 2.5, "--fps", 10)
    vidaccel("generate", "--prompt", "a cat", "-m", tiny_model, *spelled, *options, "-o", out)
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["arguments"]["negative_prompt"] == "blue" and made["arguments"]["guidance_scale"] == 2.5
    assert made["fps"] == 10 and cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FPS) == 10


def test_what_differs_from_what_was_asked_is_said(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    """Wan rounds 6 frames to 5, and does not know every word."""
    out = tmp_path / "out.mp4"
    result = vidaccel("generate", "a dog", "-m", tiny_model, *small, "--num-frames", 6, "--plan=dense", "-o", out)
    notes = json.loads(out.with_suffix(".json").read_text())["notes"]
    assert notes == [
        "6 frames were asked for and the pipeline returned 5; all 5 are in the file",
        "the model does not know the words: dog",
    ]
    assert all(f"note: {note}" in result.stdout for note in notes)
    assert len(frames_of(out)) == 5


def test_a_plan_that_skips_nothing_is_said(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    """The tiny grid is a single block, so every window covers it: no gain, and nobody should wonder why."""
    result = vidaccel("generate", "a cat", "-m", tiny_model, *small, "--plan", "sta", "-o", tmp_path / "out.mp4")
    assert "note: nothing ran sparse: " in result.stdout
    result = vidaccel("generate", "a cat", "-m", tiny_model, *small, "--plan", "dense", "-o", tmp_path / "out.mp4")
    assert "nothing ran sparse" not in result.stdout


def test_the_prompt_is_given_once(refused: Callable[..., str]) -> None:
    assert "given twice" in refused("generate", "a cat", "--prompt", "a dog")
    assert "there is no prompt; give one" in refused("generate")
    assert "there is no prompt" in refused("generate", "  ")


def test_a_bad_output_is_found_before_anything_is_loaded(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vidaccel.cli.options.open_pipeline", loaded)
    assert "does not exist; create it first" in refused("generate", "a cat", "-o", tmp_path / "no" / "a.mp4")
    assert "does not end in .mp4" in refused("generate", "a cat", "-o", tmp_path / "a.avi")
    assert "cannot write /proc/a.mp4" in refused("generate", "a cat", "-o", "/proc/a.mp4")
    (tmp_path / "a.json").mkdir()
    assert "a.json is a folder" in refused("generate", "a cat", "-o", tmp_path / "a.mp4")


def test_bad_models_plans_and_devices_are_one_sentence(
    refused: Callable[..., str], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    def run(*options: object) -> str:
        return refused("generate", "a cat", "-m", tiny_model, *small, "-o", tmp_path / "out.mp4", *options)

    assert re.search("presets are .*dense, .*sta, ", run("--plan", "stta"))
    assert "there is no model folder" in run("-m", tmp_path / "nowhere")
    assert "no model_index.json" in run("-m", tmp_path)
    assert "--model is empty" in run("-m", "")
    truncated = plan_file(tmp_path / "cut.safetensors")
    truncated.write_bytes(truncated.read_bytes()[:100])
    assert "cut.safetensors" in run("--plan", truncated)
    assert "missing.safetensors" in run("--plan", tmp_path / "missing.safetensors")
    assert "dtype is 'int3'" in run("--dtype", "int3")
    assert "there is no device 'warp'; here are cpu" in run("--device", "warp")
    assert "leave it out" in run("--cpu-offload")
    assert "takes no argument frame_rate" in run("--arg", "frame_rate=8")
    assert "takes no argument image" in run("--image", picture(tmp_path / "cat.png"))
    assert "cannot be read" in run("--image", tmp_path / "nothing.png")
    assert "given twice" in run("--arg", "height=32")
    assert "give NAME=VALUE" in run("--arg", "height")
    assert "divisible by 16" in run("--height", 50)
    assert "there is no LoRA" in run("--lora", tmp_path / "no.safetensors")
    assert not (tmp_path / "out.mp4").exists() and not (tmp_path / "out.json").exists()


def picture(path: Path) -> Path:
    """A small grey image."""
    cv2.imwrite(str(path), np.full((16, 16, 3), 128, np.uint8))
    return path


def test_a_plan_for_another_model_is_refused_or_warned_about(
    refused: Callable[..., str],
    vidaccel: Callable[..., Any],
    tiny_model: Path,
    small: tuple[str, ...],
    tmp_path: Path,
) -> None:
    plan = plan_file(tmp_path / "other.safetensors", heads=40)
    options = ("generate", "a cat", "-m", tiny_model, *small, "--plan", plan, "-o", tmp_path / "out.mp4")
    assert "number of heads is 2, the plan was made for 40" in refused(*options)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = vidaccel(*options, "--allow-mismatch")
    assert "warning: " in result.stderr and "number of heads is 2" in result.stderr


def test_a_plan_for_another_grid_is_refused_and_leaves_no_file(
    refused: Callable[..., str], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    plan = plan_file(tmp_path / "grid.safetensors", grid=VideoGrid(21, 30, 52))
    told = refused("generate", "a cat", "-m", tiny_model, *small, "--plan", plan, "-o", tmp_path / "out.mp4")
    assert "21x30x52" in told and "5x3x4" in told
    assert [path.name for path in tmp_path.iterdir()] == ["grid.safetensors"]


def test_a_pipeline_without_video_transformer(refused: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    """The tiny model with a transformer for pictures in place of its own."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pictures")
    told = refused("generate", "a cat", "-m", tmp_path / "pictures", "-o", tmp_path / "out.mp4")
    assert "has no video transformer" in told


def test_an_interrupt_leaves_no_partial_file(
    vidaccel: Callable[..., Any],
    tiny_model: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pressed while ffmpeg writes: an older video of the same name stays as it was."""
    out = tmp_path / "out.mp4"
    out.write_text("older")

    def interrupted(command: list[str], **options: Any) -> Any:
        Path(command[-1]).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("vidaccel.pipelines.video.subprocess.run", interrupted)
    vidaccel("generate", "a cat", "-m", tiny_model, *small, "-o", out, code=130)
    assert out.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_strict_refuses_what_cannot_run_as_planned(
    refused: Callable[..., str],
    tiny_model: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing_runs(*_: Any, **__: Any) -> None:
        raise KernelError("no kernel at all")

    monkeypatch.setattr("vidaccel.engine.choice.select", nothing_runs)
    plan = plan_file(tmp_path / "window.safetensors")
    told = refused("generate", "a cat", "-m", tiny_model, *small, "--plan", plan, "-o", tmp_path / "o.mp4", "--strict")
    assert "cannot run as the plan says: no kernel at all" in told


def test_compile_runs(
    vidaccel: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That compiled blocks give the right video is tested with the patcher; here: the flag reaches them."""
    reached = []
    monkeypatch.setattr(
        "vidaccel.pipelines.load.compile_transformers", lambda pipe: reached.append(type(pipe).__name__)
    )
    small = ("--height=32", "--width=32", "--num-frames=5", "--num-inference-steps=1")
    vidaccel("generate", "a cat", "-m", tiny_model, *small, "--compile", "-o", tmp_path / "out.mp4")
    assert reached == ["WanPipeline"]


def test_the_model_is_read_from_where_it_is(
    vidaccel: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder that could be a hub id is the folder."""
    shutil.copytree(tiny_model, tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    small = ("--height=32", "--width=32", "--num-frames=5", "--num-inference-steps=1")
    vidaccel("generate", "a cat", "-m", "owner/model", *small)
    assert (tmp_path / "out.mp4").exists() and (tmp_path / "out.json").exists()


def test_the_step_cache_of_a_plan_and_another_beside_it(
    vidaccel: Callable[..., Any], refused: Callable[..., str], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    steps = tuple("--num-inference-steps=9" if option.startswith("--num-inf") else option for option in small)
    plan = tmp_path / "cached.yaml"
    plan.write_text("name: cached\nrules: []\ncache: taylorseer:2\n")
    shown = vidaccel("inspect", plan).output
    assert "step cache" in shown and "taylorseer:2" in shown
    calls = {}
    for cache in (None, "none", "taylorseer:3"):
        out = tmp_path / f"{cache}.mp4".replace(":", "-")
        given = () if cache is None else ("--cache", cache)
        vidaccel("generate", "a red ball", "-m", tiny_model, "--plan", plan, *steps, *given, "-o", out)
        made = json.loads(out.with_suffix(".json").read_text())
        calls[made["cache"]] = made["report"]["calls"]
    assert set(calls) == {"taylorseer:2", None, "taylorseer:3"} and calls[None] == 9 * 2 * 2
    assert calls["taylorseer:3"] < calls["taylorseer:2"] < calls[None]
    said = refused("generate", "a red ball", "-m", tiny_model, "--cache", "tea", *steps, "-o", tmp_path / "x.mp4")
    assert "the cache 'tea' is not known" in said
