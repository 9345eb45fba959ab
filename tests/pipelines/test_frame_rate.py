"""Every pipeline's frame rate, against what diffusers' own pipeline says of itself."""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar

import diffusers
import pytest
from torch import nn

from tests.patchers.test_zoo import CASES, OLDER
from tests.tiny_wan import tiny_wan
from tests.zoo.case import Case
from vidaccel.errors import ConfigError
from vidaccel.patchers.dense_only import DENSE_ONLY
from vidaccel.patchers.registry import families
from vidaccel.pipelines.frame_rate import UNKNOWN, frame_rate

#: Where diffusers' example writes another rate than the model was trained at, or there is no example: the rate, and
#: who says so.
ELSEWHERE = {
    "HunyuanVideoPipeline": (24, "Tencent's sample_video.py"),
    "HunyuanVideoImageToVideoPipeline": (24, "Tencent's sample_image2video.py"),
    "HunyuanSkyreelsImageToVideoPipeline": (24, "Skywork's README: 24 fps"),
    "HunyuanVideo15Pipeline": (24, "the example of the image-to-video pipeline, and Tencent's README"),
    "MochiPipeline": (30, "Genmo's README and diffusers' page of the pipeline"),
}
#: An example that sets the rate itself: what the model is told by default counts.
BY_SIGNATURE = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
ONE_EACH = list({case.pipeline.split("-")[0]: case for case in reversed(CASES)}.values())


class Named:
    """A pipeline of which only the class matters."""

    def __init__(self, cls: type) -> None:
        self.__class__ = type(cls.__name__, (Named,), {"__call__": cls.__call__})


def by_signature(name: str) -> float | None:
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    return next((parameters[word].default for word in ("frame_rate", "fps") if word in parameters), None)


def by_example(name: str) -> set[float]:
    module = inspect.getmodule(getattr(diffusers, name))
    text = getattr(module, "EXAMPLE_DOC_STRING", "")
    return {float(found) for found in re.findall(r"\b(?:fps|frame_rate) ?= ?([0-9.]+)", text)}


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_the_rate_of_every_pipeline_is_what_diffusers_says(case: Case) -> None:
    pipe = case.make()
    name = case.pipeline.split("-")[0]
    found = frame_rate(pipe, {})
    signature, example = by_signature(name), by_example(name)
    assert found.note is None
    if name in ELSEWHERE:
        assert signature is None and found.fps == ELSEWHERE[name][0]
        assert {ELSEWHERE[name][0]} != example, "diffusers says it itself by now; take it out of the list"
    elif signature is not None:
        times = 2 if name == "LTX2DFRTemporalRefinePipeline" else 1  # it puts a frame between every two
        assert found.fps == times * signature
        assert name in BY_SIGNATURE or not example or example == {signature}
    else:
        assert example == {found.fps}, "neither signature nor example says so"


def test_that_was_every_pipeline_of_the_families() -> None:
    tested = {case.pipeline.split("-")[0] for case in ONE_EACH}
    known = {name for family in families() for name in family.pipelines if hasattr(diffusers, name)}
    assert known <= tested or OLDER, known - tested
    assert {*ELSEWHERE, *BY_SIGNATURE} <= tested or OLDER


def test_the_families_say_what_the_signatures_say() -> None:
    """So that a pipeline whose call does not take the rate, as a modular one, has that of its family."""
    for family in families():
        for name in family.pipelines:
            if hasattr(diffusers, name) and (told := by_signature(name)) is not None:
                assert family.frame_rate(Named(getattr(diffusers, name))) == told, name
        assert family.fps is not None or not family.pipelines
        assert {*family.fps_of, *family.times_frame_rate} <= {*family.pipelines}


def test_kinds_that_stay_dense_have_a_rate_too() -> None:
    for kind in DENSE_ONLY:
        assert {*kind.fps_of} <= {*kind.pipelines}
        for name in kind.pipelines:
            if not hasattr(diffusers, name):
                continue
            cls = getattr(diffusers, name)
            told, example = by_signature(name), by_example(name)
            found = kind.frame_rate(Named(cls))
            assert found is not None
            if isinstance(told, int | float):
                assert found == told
            elif example:
                assert example == {found}, name


def test_what_the_user_tells_the_model_counts() -> None:
    pipe = next(case for case in CASES if case.pipeline == "LTXPipeline").make()
    assert frame_rate(pipe, {}).fps == 25
    assert frame_rate(pipe, {"frame_rate": 12.5}).fps == 12.5
    for bad in (0, -1, float("nan"), "fast", True):
        with pytest.raises(ConfigError, match="give a positive number of frames per second"):
            frame_rate(pipe, {"frame_rate": bad})


def test_the_model_of_wan_that_makes_more_frames() -> None:
    """Wan 2.2's 5B model has the pipeline class of the others, and 24 frames a second."""
    pipe = tiny_wan()
    assert frame_rate(pipe, {}).fps == 16
    pipe.register_to_config(expand_timesteps=True)
    assert frame_rate(pipe, {}).fps == 24


def test_a_pipeline_that_nobody_knows_is_a_guess_and_says_so() -> None:
    class Foreign:
        components: ClassVar[dict[str, Any]] = {"transformer": nn.Linear(1, 1), "nothing": None}

        def __call__(self, prompt: str) -> None: ...

    found = frame_rate(Foreign(), {})
    assert found.fps == UNKNOWN and found.note is not None
    assert "frame rate of Foreign" in found.note and "give --fps" in found.note
