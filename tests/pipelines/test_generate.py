"""One run of a pipeline: the frames of a plain call, seconds by stage, and nothing left behind."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_wan import tiny_wan
from vidaccel.errors import ConfigError
from vidaccel.pipelines.generate import STAGES, Request, accepted_arguments, generate, num_steps, unknown_words
from vidaccel.pipelines.video import to_frames

SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan()


def test_frames_are_those_of_a_plain_call(pipe: Any) -> None:
    plain = pipe("a red cat", generator=torch.Generator().manual_seed(3), output_type="np", **SMALL).frames[0]
    made = generate(pipe, Request("a red cat", 3, SMALL))
    assert made.frames.shape == (5, 32, 48, 3)
    assert np.array_equal(made.frames, to_frames(plain))
    other = generate(pipe, Request("a red cat", 4, SMALL))
    assert not np.array_equal(made.frames, other.frames), "the seed must matter"


def test_latents_are_what_the_vae_decoded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    decode = pipe.vae.decode

    def watched(latents: torch.Tensor, **options: Any) -> Any:
        seen.append(latents.clone())
        return decode(latents, **options)

    monkeypatch.setattr(pipe.vae, "decode", watched)
    made = generate(pipe, Request("a red cat", 3, SMALL))
    assert made.latents is not None and torch.equal(made.latents, seen[0])


def test_a_video_decoded_piece_by_piece_has_no_latents(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process = pipe.video_processor.postprocess_video

    def twice(video: torch.Tensor, **options: Any) -> Any:
        pipe.vae.decode(torch.zeros(1, pipe.vae.config.z_dim, 1, 2, 2), return_dict=False)
        return process(video, **options)

    monkeypatch.setattr(pipe.video_processor, "postprocess_video", twice)
    assert generate(pipe, Request("a red cat", 3, SMALL)).latents is None


def test_settings_reproduce_the_run(pipe: Any) -> None:
    made = generate(pipe, Request("a cat", 7, {**SMALL, "guidance_scale": 2.0}))
    settings = json.loads(json.dumps(made.settings))
    again = generate(pipe, Request(settings["prompt"], settings["seed"], settings["arguments"]))
    assert np.array_equal(made.frames, again.frames)
    assert settings["frames"] == {"count": 5, "height": 32, "width": 48}
    assert (settings["pipeline"], settings["dtype"], settings["device"]) == ("WanPipeline", "float32", "cpu")


def test_every_stage_is_timed_and_the_stages_add_up(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is replaced by one that ticks once a look, so the figures are exact."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("vidaccel.pipelines.generate.time.perf_counter", lambda: float(next(ticks)))
    seconds = generate(pipe, Request("a cat", 0, SMALL)).seconds
    assert set(seconds) == {*STAGES, "total"}
    assert seconds["total"] == sum(seconds[stage] for stage in STAGES)
    # prompt and negative prompt are encoded, each between two looks; the two denoising steps are one stretch
    assert (seconds["text"], seconds["denoise"], seconds["decode"]) == (2, 1, 1)


def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    def state() -> list[Any]:
        parts = [pipe.transformer, pipe.vae, pipe.text_encoder]
        hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts]
        return [hooks, [sorted(vars(owner)) for owner in (pipe, *parts)]]

    before = state()
    generate(pipe, Request("a cat", 0, SMALL))
    with pytest.raises(ConfigError):
        generate(pipe, Request("a cat", 0, {**SMALL, "height": 33}))
    assert state() == before


def test_an_argument_the_pipeline_lacks_is_an_error(pipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"WanPipeline takes no argument frame_rate; it takes .*guidance_scale"):
        generate(pipe, Request("a cat", 0, {**SMALL, "frame_rate": 8}))
    assert "num_frames" in accepted_arguments(pipe) and "prompt" not in accepted_arguments(pipe)


def test_what_the_pipeline_refuses_is_told_in_its_words(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="WanPipeline refuses its inputs: .*divisible by 16"):
        generate(pipe, Request("a cat", 0, {**SMALL, "height": 33}))


def test_errors_that_are_bugs_stay_what_they_are(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(pipe.transformer, "forward", broken)
    with pytest.raises(ValueError, match="a bug") as caught:
        generate(pipe, Request("a cat", 0, SMALL))
    assert not isinstance(caught.value, ConfigError)


def test_a_pipeline_of_pictures_is_refused() -> None:
    class Painter:
        device = torch.device("cpu")

        def __call__(self, prompt: str, generator: Any = None, output_type: str = "pil") -> Any:
            return type("Output", (), {"images": []})()

    with pytest.raises(ConfigError, match="Painter returned no frames"):
        generate(Painter(), Request("a cat"))


def test_steps_come_from_the_request_or_the_signature(pipe: Any) -> None:
    assert num_steps(pipe, Request("a", 0, SMALL)) == 2
    assert num_steps(pipe, Request("a")) == 50


def test_words_outside_the_vocabulary_are_named(pipe: Any) -> None:
    assert unknown_words(pipe, "a red cat surfing on waves") == ["the model does not know the words: surfing, waves"]
    assert unknown_words(pipe, "a red cat") == []
    assert unknown_words(object(), "anything") == []
