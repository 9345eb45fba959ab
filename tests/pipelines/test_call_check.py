"""Calls that cannot work are refused before anything is computed; calls that can are not."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from tests.patchers.test_zoo import CASES, OLDER
from tests.tiny_wan import tiny_wan
from tests.zoo.case import Case
from vidaccel.errors import ConfigError, PlanMismatchError
from vidaccel.patchers.catalogue import IMAGES
from vidaccel.patchers.registry import families
from vidaccel.pipelines.call_check import GIVEN, check_call
from vidaccel.pipelines.generate import Request, generate

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}


def is_input(value: Any) -> bool:
    """Whether it is something other than a setting: a picture, a video, latents."""
    return not isinstance(value, int | float | str | bool | torch.Generator | None)


class FirstStep(Exception):
    pass


def runs_without(case: Case, missing: set[str]) -> bool:
    """Whether diffusers comes to its first step without these arguments."""

    def reached(*_: Any) -> None:
        raise FirstStep

    pipe = case.make()
    for name, part in pipe.components.items():
        if name.startswith("transformer") and part is not None:
            part.register_forward_pre_hook(reached)
    try:
        case.run(pipe, **{name: inspect.signature(type(pipe).__call__).parameters[name].default for name in missing})
    except FirstStep:
        return True
    except Exception:  # noqa: BLE001 - whatever it stumbles over
        return False
    raise AssertionError("no step at all")


def inputs_of(case: Case) -> set[str]:
    found = {name for name, value in case.call().items() if is_input(value) and "prompt" not in name}
    return found - {"sigmas", "history_sizes"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_that_works_is_not_refused(case: Case) -> None:
    call = {name: value for name, value in case.call().items() if name not in GIVEN}
    check_call(case.make(), call)


@pytest.mark.parametrize("case", [case for case in CASES if inputs_of(case)], ids=str)
def test_what_a_pipeline_cannot_do_without_is_known_from_its_class(case: Case) -> None:
    """All inputs left out, and diffusers asked whether it comes to its first step like that."""
    inputs = inputs_of(case)
    cls = type(case.make())
    call = {name: value for name, value in case.call().items() if name not in {*inputs, *GIVEN}}
    if runs_without(case, inputs):
        check_call(cls, call)
        return
    with pytest.raises(ConfigError, match=r" needs [a-z_, ]+; (give --(image FILE|arg \w+=@FILE)|no option can give)"):
        check_call(cls, call)


def test_the_needs_are_of_arguments_that_there_are() -> None:
    for family in families():
        assert {*family.needs} <= {*family.pipelines}
        for pipeline, needs in family.needs.items():
            if hasattr(diffusers, pipeline):
                known = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
                assert {name for choice in needs for name in choice} <= {*known}


def test_everything_that_is_missing_is_said_at_once_with_its_option() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^WanAnimatePipeline needs image, pose_video, face_video; give --image FILE,"
        r" and --arg pose_video=@FILE, an .mp4 or a folder of pictures, and --arg face_video=@FILE",
    ):
        check_call(diffusers.WanAnimatePipeline, {})
    with pytest.raises(ConfigError, match=r"needs image or video; give --image FILE or --arg video=@FILE"):
        check_call(diffusers.Cosmos2VideoToWorldPipeline, {})
    with pytest.raises(ConfigError, match=r"ConsisIDPipeline needs .*; no option can give that, so call"):
        check_call(diffusers.ConsisIDPipeline, {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"latents": "x"}, "latents is 'x', and WanPipeline takes Tensor there; no option can give that"),
        ({"latents": [1, 2]}, "WanPipeline takes Tensor"),
        ({"callback_on_step_end": "print"}, "no option can give that"),
        ({"guidance_scale": "strong"}, "takes float there; give such a value, as JSON"),
        ({"guidance_scale": True}, "takes float there"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; give a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; give a finite number"),
        ({"num_videos_per_prompt": "two"}, "takes int there"),
        ({"num_videos_per_prompt": 2.5}, "takes int there"),
        ({"num_videos_per_prompt": 0}, "give a whole number of at least 1"),
        ({"num_videos_per_prompt": 2}, "this takes one clip of a prompt; leave it out"),
        ({"attention_kwargs": 3}, r"takes [dD]ict\[str, Any\] there; give such a value, as JSON"),
        ({"height": "tall"}, "height is 'tall', and WanPipeline takes int there"),
        ({"num_frames": None}, "num_frames is None"),
        ({"width": 100_000}, "H.264 video has at most 16384 pixels a side"),
        ({"num_frames": 10**9}, r"1000000000 frames of 832x480 take [\d,]+ GiB as pixels alone, and this machine has"),
        ({"frame_rate": 8}, "takes no argument frame_rate; it takes .*guidance_scale"),
        ({"output_type": "latent"}, "output_type is not yours to give: vidaccel asks for frames"),
        ({"return_dict": False}, "return_dict is not yours to give"),
        ({"generator": 1}, "it is made of the seed"),
        ({"prompt": "a cat"}, "it is the prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused_without_the_pipeline(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_call(diffusers.WanPipeline, arguments)


def test_what_can_work_is_not() -> None:
    check_call(diffusers.WanPipeline, {"guidance_scale": 3, "negative_prompt": ["a"], "latents": None})
    check_call(diffusers.WanPipeline, {"num_videos_per_prompt": 2}, several=True)
    check_call(diffusers.LTXPipeline, {"timesteps": [900, 500], "frame_rate": 12})
    check_call(diffusers.HunyuanVideoPipeline, {"sigmas": [1, 0.5]})
    with pytest.raises(ConfigError, match=r"sigmas is \['a'\], and HunyuanVideoPipeline takes [lL]ist\[float\] there"):
        check_call(diffusers.HunyuanVideoPipeline, {"sigmas": ["a"]})


@pytest.mark.parametrize("name", [name for name in IMAGES if hasattr(diffusers, name)])
def test_pipelines_of_pictures_are_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} makes single images"):
        check_call(getattr(diffusers, name), {})


def test_a_pipeline_that_is_loaded_knows_more() -> None:
    pipe = tiny_wan()
    levels = pipe.scheduler.config.num_train_timesteps
    check_call(pipe, {**SMALL, "num_inference_steps": levels})
    with pytest.raises(ConfigError, match=f"the scheduler knows {levels} noise levels; give 1 to {levels}"):
        check_call(pipe, {**SMALL, "num_inference_steps": levels + 1})


@pytest.mark.parametrize(("name", "end"), [("height", 32 * 16), ("width", 32 * 16), ("num_frames", 31 * 4 + 1)])
def test_the_table_of_positions_has_an_end(name: str, end: int) -> None:
    """The tiny transformer knows 32 positions an axis; diffusers fails on one more in a tensor operation."""
    pipe = tiny_wan()
    tiny = {**SMALL, "height": 16, "width": 16, "num_inference_steps": 1}
    assert generate(pipe, Request("a cat", 0, {**tiny, name: end})).frames.size
    step = 4 if name == "num_frames" else 16
    with pytest.raises(ConfigError, match=f"{name} is {end + step}; the model knows positions up to {end}, so give"):
        check_call(pipe, {**tiny, name: end + step})
    with pytest.raises(RuntimeError, match="shape"):
        pipe("a cat", **{**tiny, name: end + step}, output_type="latent")


@pytest.mark.parametrize("name", ["Allegro", "CogVideoX", "Mochi", "Wan", "LTX"])
def test_a_video_of_less_than_a_token(name: str) -> None:
    case = next(case for case in CASES if case.pipeline.split("-")[0] == f"{name}Pipeline")
    pipe = case.make()
    call = {name: value for name, value in case.call().items() if name not in GIVEN}
    with pytest.raises(ConfigError, match=r"width is 8; a token of this model is (16|32) pixels, so give"):
        check_call(pipe, {**call, "width": 8})


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 10**20])
def test_a_seed_that_torch_does_not_take(seed: int) -> None:
    with pytest.raises(ConfigError, match="torch takes -9223372036854775808 to 18446744073709551615"):
        Request("a cat", seed)
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_a_seed_that_torch_takes(seed: int) -> None:
    torch.Generator().manual_seed(Request("a cat", seed).seed)


def test_a_call_without_prompt_would_lose_it() -> None:
    class Mute:
        device = torch.device("cpu")

        def __call__(self, generator: Any = None, output_type: str = "np") -> Any: ...

    with pytest.raises(ConfigError, match="Mute takes no prompt, so the prompt would be lost"):
        check_call(Mute(), {})


@pytest.mark.skipif(OLDER, reason="the file of that pipeline is newer")
def test_what_the_pipeline_says_itself_is_a_sentence() -> None:
    """Also where it says so elsewhere than in check_inputs."""
    case = next(case for case in CASES if case.pipeline == "CosmosVideoToWorldPipeline")
    pipe = case.make()
    with pytest.raises(ConfigError, match="refuses its inputs: "):
        generate(pipe, Request("a cat", 0, {"height": 33, "width": 80, "num_frames": 9, "image": _picture()}))


def test_a_pipeline_written_in_a_notebook_fails_with_its_own_error() -> None:
    """Its module has no file to compare with."""

    class Here:
        device = torch.device("cpu")

        def __call__(self, prompt: str, generator: Any = None) -> Any:
            raise ValueError("a bug")

    Here.__module__ = "of_no_file"
    with pytest.raises(ValueError, match="^a bug$"):
        generate(Here(), Request("a cat"))


def test_what_is_raised_on_purpose_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan()

    def strict(*args: Any, **kwargs: Any) -> None:
        raise PlanMismatchError("made for another model")

    monkeypatch.setattr(pipe, "check_inputs", strict)
    with pytest.raises(PlanMismatchError, match="^made for another model$"):
        generate(pipe, Request("a cat", 0, SMALL))


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (80, 48))


def test_too_little_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan()

    def full(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(2**60, dtype=torch.uint8)  # torch's own words

    monkeypatch.setattr(pipe, "prepare_latents", full)
    with pytest.raises(ConfigError, match="too little memory for width 48, height 32, num_frames 5; ask for fewer or"):
        generate(pipe, Request("a cat", 0, SMALL))
