"""How many frames a second a pipeline's videos are meant to be played at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..engine.unwrap import unwrapped
from ..errors import ConfigError
from ..patchers.base import Family
from ..patchers.dense_only import DENSE_ONLY, DenseOnly
from ..patchers.registry import dense_only_of, families, family_of
from .call_signature import default_of

__all__ = ["UNKNOWN", "FrameRate", "frame_rate"]

#: What is written where nobody knows the rate; the output says so.
UNKNOWN = 16.0

#: What diffusers' pipelines call the argument that tells the model its frame rate.
_ARGUMENTS = ("frame_rate", "fps", "target_fps")


@dataclass(frozen=True)
class FrameRate:
    """A rate, and what is to be said about it.

    Args:
        fps: frames per second.
        note: a sentence where the rate is a guess.
    """

    fps: float
    note: str | None = None


def frame_rate(pipe: Any, arguments: Mapping[str, Any]) -> FrameRate:
    """The rate of what ``pipe`` makes of these arguments of its call.

    What the call says counts first, given or by default, because the model is told so. Then what the family says of
    this pipeline.

    Raises:
        ConfigError: the rate in ``arguments`` is no positive number.
    """
    kind = _kind(pipe)
    for name in _ARGUMENTS:
        told = arguments.get(name, default_of(pipe, name))
        if told is None:
            continue
        if isinstance(told, bool) or not isinstance(told, int | float) or not 0 < told < float("inf"):
            raise ConfigError(f"{name} is {told!r}; give a positive number of frames per second")
        times = kind.times_frame_rate if isinstance(kind, Family) else {}
        return FrameRate(told * next((times[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in times), 1.0))
    known = None if kind is None else kind.frame_rate(pipe)
    if known is not None:
        return FrameRate(known)
    return FrameRate(
        UNKNOWN,
        f"nobody has told vidaccel the frame rate of {type(pipe).__name__}, so the file has {UNKNOWN:g} frames per"
        " second; give --fps if that is not it",
    )


def _kind(pipe: Any) -> Family | DenseOnly | None:
    """The family of the pipeline's transformer, or of a pipeline of that name."""
    for part in getattr(pipe, "components", {}).values():
        model = unwrapped(part)
        kind = (family_of(model) or dense_only_of(model)) if isinstance(model, nn.Module) else None
        if kind is not None:
            return kind
    names = {cls.__name__ for cls in type(pipe).__mro__}
    kinds: list[Family | DenseOnly] = [*families(), *DENSE_ONLY]
    return next((kind for kind in kinds if names & {*kind.pipelines}), None)
