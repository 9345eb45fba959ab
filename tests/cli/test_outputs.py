"""Whatever a saved pipeline returns is in the files of ``vidaccel generate``, at the model's frame rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import SMALL
from tests.patchers.test_zoo import CASES
from tests.probe import AAC_FRAME, probe
from tests.tiny_wan import tiny_text, tiny_wan
from tests.zoo.case import Case
from vidaccel.patchers.wan import WanFamily
from vidaccel.pipelines.call_check import GIVEN

#: What each pipeline's ``encode_prompt`` returns, by the names of the zoo's arguments.
ENCODED = {
    "LTX2Pipeline": (
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    ),
    "Kandinsky6TI2VAPipeline": (
        "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask",
        "negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_attention_mask",
    ),
}  # fmt: skip


def zoo_case(name: str) -> Case:
    return next(case for case in CASES if case.pipeline.split("-")[0] == name)


def options_of(call: dict[str, Any], folder: Path) -> Iterator[str]:
    """The command's options for the arguments of a call; pictures are put into ``folder``."""
    for name, value in call.items():
        if name in GIVEN or name == "negative_prompt" or "embeds" in name or "attention_mask" in name:
            continue
        if isinstance(value, Image.Image):
            value.save(folder / f"{name}.png")
            yield f"--image={folder / name}.png" if name == "image" else f"--arg={name}=@{folder / name}.png"
        elif isinstance(value, list) and isinstance(value[0], Image.Image):
            (folder / name).mkdir()
            for number, picture in enumerate(value):
                picture.save(folder / name / f"{number:03}.png")
            yield f"--arg={name}=@{folder / name}"
        elif name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale"):
            yield f"--{name.replace('_', '-')}={value}"
        else:
            yield f"--arg={name}={json.dumps(value)}"


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Path, tuple[str, ...]]]:
    """Saves a pipeline of the zoo; where it has no text encoder, the zoo's prompt embeddings stand for its own.

    Returns the folder, and options for a small run.
    """

    def save(name: str) -> tuple[Path, tuple[str, ...]]:
        case = zoo_case(name)
        pipe = case.make()
        if name == "LTX2Pipeline":  # the zoo's has a decoder that is never run
            pipe.vae = diffusers.AutoencoderKLLTX2Video(
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 16, 32),
                layers_per_block=(1,) * 5,
                decoder_layers_per_block=(1,) * 4,
                spatial_compression_ratio=32,
                temporal_compression_ratio=8,
            ).eval()
        call = case.call()
        tokenizer, encoder = tiny_text()  # only there to be loaded
        for part in [name for name, part in pipe.components.items() if part is None]:
            if part.startswith(("text_encoder", "tokenizer")):
                pipe.register_modules(**{part: encoder if part.startswith("text") else tokenizer})

        def encode_prompt(self: Any, *args: Any, num_videos_per_prompt: int = 1, **options: Any) -> Any:
            found = (call.get(word) for word in ENCODED[name])
            return tuple(None if one is None else one.repeat_interleave(num_videos_per_prompt, 0) for one in found)

        if name in ENCODED:
            monkeypatch.setattr(type(pipe), "encode_prompt", encode_prompt)
        pipe.save_pretrained(tmp_path / "model")
        return tmp_path / "model", tuple(options_of(call, tmp_path))

    return save


@pytest.fixture
def generated(vidaccel: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any], str]]:
    """Runs ``vidaccel generate`` densely; returns the video, what is in the .json, and stdout."""

    def run(model: Path, *options: object, prompt: str = "a cat") -> tuple[Path, dict[str, Any], str]:
        out = tmp_path / "out.mp4"
        told = vidaccel("generate", prompt, "-m", model, "--plan", "dense", "--dtype=fp32", *options, "-o", out).stdout
        return out, json.loads(out.with_suffix(".json").read_text()), told

    return run


#: Pipelines of the zoo with a text encoder, whose inputs come from files.
READY = sorted(
    {case.pipeline.split("-")[0] for case in CASES if "prompt" in case.call()}
    - {"ConsisIDPipeline"}  # takes tensors
    - {
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2VideoToWorldPipeline",
    }  # load a safety checker
    - {"MotifVideoImage2VideoPipeline"}  # cannot be loaded without an image encoder
)


@pytest.mark.full
@pytest.mark.parametrize("name", READY)
def test_every_pipeline_is_run_from_the_command_line(saved: Any, generated: Any, name: str) -> None:
    model, options = saved(name)
    out, made, _ = generated(model, *options)
    assert made["pipeline"] == name and probe(out).frames == made["frames"]["count"]
    assert probe(out).fps == made["fps"]


@pytest.mark.parametrize(("name", "fps"), [("CogVideoXPipeline", 8), ("LTXPipeline", 25)])
def test_the_file_has_the_models_frame_rate(saved: Any, generated: Any, name: str, fps: float) -> None:
    model, small = saved(name)
    out, made, _ = generated(model, *small)
    assert made["fps"] == fps and probe(out).fps == fps
    assert probe(out).frames == made["frames"]["count"]
    out, made, _ = generated(model, *small, "--fps", 11)
    assert made["fps"] == probe(out).fps == 11


def test_the_rate_that_the_model_is_told_is_that_of_the_file(saved: Any, generated: Any) -> None:
    model, small = saved("LTXPipeline")
    out, made, _ = generated(model, *small, "--arg", "frame_rate=12")
    assert made["fps"] == probe(out).fps == 12 and made["arguments"]["frame_rate"] == 12


@pytest.mark.parametrize(
    ("name", "rate", "channels"), [("LTX2Pipeline", 16000, 2), ("Kandinsky6TI2VAPipeline", 44100, 1)]
)
@pytest.mark.parametrize("clips", [1, 2])
def test_the_sound_is_in_the_file(saved: Any, generated: Any, name: str, rate: int, channels: int, clips: int) -> None:
    model, small = saved(name)
    several = () if clips == 1 else (f"--arg=num_videos_per_prompt={clips}",)
    out, made, told = generated(model, *small, *several)
    files = [out.with_name(name) for name in made["files"]]
    assert files == [out, out.with_name("out-2.mp4")][:clips]
    sounds = []
    for file in files:
        found = probe(file)
        assert (found.frames, found.fps, found.rate, found.channels) == (made["frames"]["count"], 24, rate, channels)
        assert found.sound is not None
        count = made["sound"]["samples"]
        assert count <= len(found.sound) < count + 2 * AAC_FRAME and np.abs(found.sound).max() > 0
        sounds.append(found.sound)
    assert made["sound"]["sample_rate"] == rate and made["sound"]["channels"] == channels
    assert f"s of sound ({channels} x {rate} Hz)" in told
    assert clips == 1 or not np.array_equal(sounds[0], sounds[1])


def test_a_model_that_is_asked_for_silence_is_silent(saved: Any, generated: Any) -> None:
    model, small = saved("Kandinsky6TI2VAPipeline")
    out, made, told = generated(model, *small, "--arg", "sample_audio=false")
    assert probe(out).rate is None and "sound" not in made and "sound" not in told


def test_sound_at_another_rate_than_its_pictures_is_said(saved: Any, generated: Any) -> None:
    model, small = saved("Kandinsky6TI2VAPipeline")
    _, made, _ = generated(model, *small, "--fps=12")
    assert made["notes"] == [
        "the sound is made for 24 frames per second and the file has 12, so it does not go with the pictures"
    ]
    _, made, _ = generated(model, *small, "--arg=frame_rate=12")
    assert made["fps"] == 12 and not made["notes"]


def test_sound_takes_no_part_in_a_comparison_and_that_is_said(saved: Any, vidaccel: Any, tmp_path: Path) -> None:
    model, small = saved("Kandinsky6TI2VAPipeline")
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    options = ("--prompt", "a cat", "--plan", "dense", "--dtype=fp32", "--controls=0", *small)
    result = vidaccel("compare", "-m", model, *options, "--html", page, "--json", figures)
    note = "The model makes sound, too; it is neither compared nor in the page."
    assert note in result.stdout and note in json.loads(figures.read_text())["notes"]


def test_a_guess_at_the_frame_rate_is_said(tiny_model: Path, generated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WanFamily, "fps", None)
    out, made, told = generated(tiny_model, *SMALL)
    assert probe(out).fps == 16 and "note: nobody has told vidaccel the frame rate of WanPipeline" in told
    _, made, told = generated(tiny_model, *SMALL, "--fps=9")
    assert made["fps"] == 9 and "nobody has told" not in told


def test_the_videos_of_a_page_have_the_models_frame_rate(
    saved: Any, vidaccel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidaccel import report

    rates: list[float] = []
    original = report.clip_of
    monkeypatch.setattr(report, "clip_of", lambda *given: rates.append(given[-1]) or original(*given))
    model, small = saved("LTXPipeline")
    for more in ((), ("--arg=frame_rate=12",)):
        options = ("--prompt", "a cat", "--plan", "dense", "--dtype=fp32", "--controls=0", *small, *more)
        vidaccel("compare", "-m", model, *options, "--html", tmp_path / "page.html")
    assert rates == [25, 12]


def test_every_clip_of_a_prompt_is_written(tiny_model: Path, generated: Any) -> None:
    out, made, told = generated(tiny_model, *SMALL, "--arg=num_videos_per_prompt=3")
    files = [out, out.with_name("out-2.mp4"), out.with_name("out-3.mp4")]
    assert made["file"] == "out.mp4" and made["files"] == [file.name for file in files]
    assert ", ".join(map(str, files)) in told and "each 17 frames of 64x48" in told
    assert [probe(file).frames for file in files] == [17] * 3
    assert len({file.read_bytes() for file in files}) == 3


def test_all_of_their_files_must_be_writable(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out-2.mp4").mkdir()
    out = ("-o", tmp_path / "out.mp4")
    said = refused("generate", "a cat", "-m", tiny_model, *SMALL, "--arg=num_videos_per_prompt=2", *out)
    assert "out-2.mp4 is a folder" in said and not (tmp_path / "out.mp4").exists()


def test_a_refused_call_leaves_no_folder(refused: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    command = ("generate", "--prompts", tmp_path / "prompts.txt", "-m", tiny_model, "-o", tmp_path / "clips")
    assert "output_type is not yours to give" in refused(*command, "--arg=output_type=pt")
    assert not (tmp_path / "clips").exists()


def test_a_folder_of_clips_is_done_when_all_of_a_prompt_are_there(
    vidaccel: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na ball\n")
    out = tmp_path / "clips"
    command = ("generate", "--prompts", tmp_path / "prompts.txt", "-m", tiny_model, "--plan", "dense", *SMALL)
    command = (*command, "--arg=num_videos_per_prompt=2", "-o", out)

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in vidaccel(*command).stdout.splitlines() if line.startswith("{")]

    assert [line["files"] for line in lines()] == [
        ["001-a-cat.mp4", "001-a-cat-2.mp4"], ["002-a-ball.mp4", "002-a-ball-2.mp4"],
    ]  # fmt: skip
    found = lines()
    assert [line["state"] for line in found] == ["found", "found"]
    assert found[0]["files"] == ["001-a-cat.mp4", "001-a-cat-2.mp4"]
    lost = out / "002-a-ball-2.mp4"
    before = lost.read_bytes()
    lost.unlink()
    assert [line["state"] for line in lines()] == ["found", "made"]
    assert lost.read_bytes() == before


@pytest.mark.parametrize("command", ["compare", "calibrate"])
def test_what_measures_one_clip_refuses_several(
    refused: Callable[..., str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vidaccel.cli.options.open_pipeline", _not_loaded)
    budget = ("--density", 0.5) if command == "calibrate" else ()
    options = ("-m", tiny_model, "--prompt", "a cat", *budget, *SMALL)
    assert "this takes one clip of a prompt" in refused(command, *options, "--arg=num_videos_per_prompt=2")
    assert "output_type is not yours to give" in refused(command, *options, "--arg=output_type=latent")


def _not_loaded(*args: Any, **options: Any) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--arg=output_type=latent",), "output_type is not yours to give: vidaccel asks for frames"),
        (("--arg=return_dict=false",), "return_dict is not yours to give"),
        (("--arg=latents=x",), "no option can give that, so call the pipeline from Python"),
        (("--arg=guidance_scale=NaN",), "guidance_scale is nan; give a finite number"),
        (("--guidance-scale=nan",), "nan is not a finite number"),
        (("--guidance-scale=inf",), "inf is not a finite number"),
        (("--seed=12345678901234567890",), "error"),
        (("--seed=123456789012345678901",), "18446744073709551615"),
        (("--seed=-9223372036854775809",), "-9223372036854775808"),
        (("--width=100000",), "H.264 video has at most 16384 pixels a side"),
        (("--num-frames=1000000", "--height=960", "--width=960"), "GiB as pixels alone, and this machine has"),
        (("--num-inference-steps=99999999999",), "that is too large; give at most 1,000,000 (found '99999999999')"),
        (("--arg=video=@nothing.mp4",), "cannot be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused_before_loading(
    refused: Callable[..., str], vidaccel: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("vidaccel.cli.options.open_pipeline", _not_loaded)
    command = ("generate", "a cat", *options, "-o", tmp_path / "out.mp4")
    if says == "error":  # a seed that torch takes is not refused
        with pytest.raises(AssertionError, match="the model was loaded"):
            vidaccel(*command)
        return
    assert says in refused(*command)


def test_more_steps_than_noise_levels(refused: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    steps = ("--num-inference-steps", 1001)
    said = refused("generate", "a cat", "-m", tiny_model, *SMALL, *steps, "-o", tmp_path / "out.mp4")
    assert "the scheduler knows 1000 noise levels; give 1 to 1000" in said


def test_a_pipeline_of_pictures_needs_one(
    refused: Callable[..., str], saved: Any, generated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = saved("LTXImageToVideoPipeline")
    small = [option for option in options if not option.startswith("--image")]
    with monkeypatch.context() as patching:
        patching.setattr("vidaccel.cli.options.open_pipeline", _not_loaded)
        said = refused("generate", "a cat", "-m", model, *small, "-o", tmp_path / "out.mp4")
    assert "LTXImageToVideoPipeline needs image; give --image FILE" in said
    Image.new("RGB", (160, 96), "red").save(tmp_path / "red.png")
    out, made, _ = generated(model, *small, "--image", tmp_path / "red.png")
    assert probe(out).fps == 25 and made["inputs"] == {"image": str(tmp_path / "red.png")}


def clip_file(path: Path, count: int = 9) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 8, (48, 32))
    for number in range(count):
        writer.write(np.full((32, 48, 3), 20 * number, np.uint8))
    writer.release()
    return path


@pytest.fixture
def video_model(tmp_path: Path) -> Path:
    """A tiny Wan that changes videos."""
    parts = tiny_wan().components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = diffusers.WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    pipe.save_pretrained(tmp_path / "video-to-video")
    return tmp_path / "video-to-video"


def test_videos_come_from_files_and_folders(
    refused: Callable[..., str], video_model: Path, generated: Any, tmp_path: Path
) -> None:
    small = ("--height=32", "--width=48", "--num-inference-steps=2", "--arg=max_sequence_length=16")
    said = refused("generate", "a cat", "-m", video_model, *small, "-o", tmp_path / "out.mp4")
    assert "needs video; give --arg video=@FILE, an .mp4 or a folder of pictures" in said
    Image.new("RGB", (48, 32)).save(tmp_path / "one.png")
    single = f"--arg=video=@{tmp_path / 'one.png'}"
    said = refused("generate", "a cat", "-m", video_model, *small, single, "-o", tmp_path / "out.mp4")
    assert "video is a picture" in said and "give @FILE, an .mp4 or a folder of pictures" in said
    source = clip_file(tmp_path / "source.mp4")
    out, made, _ = generated(video_model, *small, f"--arg=video=@{source}")
    assert probe(out).frames == 9 and made["inputs"] == {"video": str(source)}
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (48, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
    out, _, _ = generated(video_model, *small, f"--arg=video=@{folder}")
    assert probe(out).frames == 5


def test_files_that_are_no_videos(refused: Callable[..., str], video_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    said = {"empty": "has no pictures in it", "text.mp4": "cannot be read by ffmpeg", "no.mp4": "cannot be read"}
    for name, says in said.items():
        source = f"--arg=video=@{tmp_path / name}"
        assert says in refused("generate", "a cat", "-m", video_model, source, "-o", tmp_path / "o.mp4")


def test_a_lora_of_the_hub_without_a_network(
    refused: Callable[..., str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TransportError(Exception):
        """As the hub's HTTP library has it."""

    def offline(*args: Any, **options: Any) -> None:
        raise TransportError("[Errno -2] Name or service not known")

    monkeypatch.setattr(diffusers.WanPipeline, "load_lora_weights", offline)
    said = refused("generate", "a cat", "-m", tiny_model, *SMALL, "--lora", "owner/name", "-o", tmp_path / "out.mp4")
    assert "owner/name is not here, and the hub cannot be reached (" in said and "give a .safetensors file" in said


@pytest.fixture
def modular(tmp_path: Path) -> Path:
    """The blocks of Wan with the components of the tiny one, saved."""
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    parts = tiny_wan().components
    pipe = WanBlocks().init_pipeline()
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe.update_components(guider=guider, **{name: parts[name] for name in names})
    pipe.save_pretrained(str(tmp_path / "modular"))
    return tmp_path / "modular"


def test_a_modular_pipeline_is_one_like_the_others(refused: Any, modular: Path, generated: Any, tmp_path: Path) -> None:
    small = [option for option in SMALL if not option.startswith("--arg")]
    out, made, _ = generated(modular, *small, "--arg=num_videos_per_prompt=2", "--arg=max_sequence_length=16")
    assert made["pipeline"] == "WanModularPipeline" and made["files"] == ["out.mp4", "out-2.mp4"]
    assert [probe(out.with_name(name)).frames for name in made["files"]] == [17, 17] and probe(out).fps == 16

    def run(*options: str) -> str:
        return refused("generate", "a cat", "-m", modular, *small, *options, "-o", tmp_path / "o.mp4").splitlines()[-1]

    assert "takes no argument frame_rate; it takes " in run("--arg=frame_rate=2")
    assert "output_type is not yours to give" in run("--arg=output_type=pt")
    assert "latents is 'x', and WanModularPipeline takes Tensor there" in run("--arg=latents=x")


def test_a_modular_pipeline_with_a_part_missing(refused: Callable[..., str], modular: Path, tmp_path: Path) -> None:
    for file in (modular / "transformer").glob("*.safetensors"):
        file.unlink()
    lines = refused("generate", "a cat", "-m", modular, *SMALL, "-o", tmp_path / "o.mp4")
    assert "transformer could not be read" in lines
