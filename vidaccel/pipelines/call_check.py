"""Whether a pipeline can be called with these arguments, found out before anything is computed, and before loading."""

from __future__ import annotations

import collections.abc
import enum
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..device import main_memory_gib
from ..errors import ConfigError
from ..patchers.catalogue import IMAGES
from ..patchers.registry import families
from ..types import SEEDS
from .call_signature import Argument, arguments_of, takes_anything, takes_pictures
from .video import LONGEST_EDGE

__all__ = ["GIVEN", "check_call", "check_seed"]

#: Arguments that `generate` gives itself, and why nobody else can.
GIVEN = {
    "prompt": "it is the prompt of vidaccel's own command",
    "generator": "it is made of the seed",
    "output_type": "vidaccel asks for frames, because it writes and measures nothing else",
    "return_dict": "vidaccel reads the videos and the sound by their names",
}
_EDGES = ("height", "width")
#: What pipelines call the pixels of a latent's edge.
_SPACE = ("vae_scale_factor_spatial", "vae_spatial_scale_factor", "vae_spatial_compression_ratio")
_CLIPS = "num_videos_per_prompt"
_STEPS = "num_inference_steps"


def check_seed(seed: int) -> None:
    """Raises `ConfigError` for a seed that torch does not take."""
    least, most = SEEDS
    if not least <= seed <= most:
        raise ConfigError(f"the seed is {seed}; torch takes {least} to {most}")


def check_call(pipe: Any, arguments: Mapping[str, Any], *, several: bool = False) -> None:
    """Raises an error unless ``pipe`` can be called with these arguments beside what `generate` gives itself.

    Args:
        pipe: a pipeline, or its class where it is not loaded yet. Only a pipeline knows the steps of its scheduler.
        several: whether more than one clip of a prompt is wanted.

    Raises:
        ConfigError: an argument is unknown, missing, of another type, not finite or too large.
    """
    name = (pipe if isinstance(pipe, type) else type(pipe)).__name__
    if name in IMAGES:
        raise ConfigError(f"{name} makes single images; give a pipeline that makes videos")
    known = arguments_of(pipe)
    for given in sorted({*arguments} & {*GIVEN}):
        raise ConfigError(f"{given} is not yours to give: {GIVEN[given]}; leave it out")
    unknown = sorted({*arguments} - {*known})
    if unknown and not takes_anything(pipe):
        others = ", ".join(sorted({*known} - {*GIVEN}))
        raise ConfigError(f"{name} takes no argument {', '.join(unknown)}; it takes {others}")
    for needed, why in (("prompt", "the prompt"), ("generator", "the seed")):
        if needed not in known and not isinstance(pipe, type) and not takes_anything(pipe):
            raise ConfigError(f"{name} takes no {needed}, so {why} would be lost; call it from Python")
    _check_missing(pipe, name, known, arguments)
    for key, value in arguments.items():
        _check_value(name, key, value, known.get(key))
    _check_sizes(known, arguments, several)
    _check_steps(pipe, arguments)
    _check_positions(pipe, arguments)


def _check_missing(pipe: Any, name: str, known: Mapping[str, Argument], arguments: Mapping[str, Any]) -> None:
    classes = {cls.__name__ for cls in (pipe if isinstance(pipe, type) else type(pipe)).__mro__}
    needs: list[tuple[str, ...]] = [(key,) for key, argument in known.items() if argument.required and key not in GIVEN]
    for family in families():
        needs += [one for pipeline, some in family.needs.items() if pipeline in classes for one in some]
    missing = [choice for choice in needs if all(arguments.get(key) is None for key in choice)]
    if not missing:
        return
    what = ", ".join(" or ".join(choice) for choice in missing)
    told = []
    for choice in missing:
        ways = [way for key in choice if (way := _option(key, known.get(key))) is not None]
        if not ways:
            raise ConfigError(f"{name} needs {what}; {_PYTHON}")
        told.append(" or ".join(ways))
    raise ConfigError(f"{name} needs {what}; give {', and '.join(told)}")


_PYTHON = "no option can give that, so call the pipeline from Python after vidaccel.patch(pipe)"


def _option(name: str, argument: Argument | None) -> str | None:
    """The option that gives an argument, ``None`` if none does."""
    hint = None if argument is None else argument.hint
    if _shown(hint):
        return "--image FILE" if name == "image" else f"--arg {name}=@FILE, {_shown(hint)}"
    return f"--arg {name}=VALUE" if _is_simple(hint) else None


def _shown(hint: Any) -> str:
    """What kind of files an argument takes that is made of pictures; empty for any other."""
    if not takes_pictures(hint):
        return ""
    single = any(isinstance(kind, type) and takes_pictures(kind) for kind in _choices(hint))
    return "a picture, an .mp4 or a folder of pictures" if single else "an .mp4 or a folder of pictures"


def _is_simple(hint: Any) -> bool:
    simple = (str, int, float, bool, list, tuple, dict)
    return any(
        typing.get_origin(kind) in (*simple, typing.Literal)
        or kind in simple
        or (isinstance(kind, type) and issubclass(kind, enum.Enum))
        for kind in _choices(hint)
    )


def _check_value(pipeline: str, name: str, value: Any, argument: Argument | None) -> None:
    if not _finite(value):
        raise ConfigError(f"{name} is {value}; give a finite number")
    if argument is None or argument.hint is None or not _plain(value) or (value is None and argument.default is None):
        return
    if isinstance(value, list) and value and all(map(_is_picture, value)) and _shown(argument.hint):
        return  # annotations of single pictures are of pipelines that take a list, too
    if not _fits(value, argument.hint):
        hint = argument.hint
        files = f"give @FILE, {_shown(hint)}" if _shown(hint) else ""
        told = files or ("give such a value, as JSON" if _is_simple(hint) else _PYTHON)
        raise ConfigError(f"{name} is {_short(value)}, and {pipeline} takes {_names(hint)} there; {told}")


def _plain(value: Any) -> bool:
    """Whether it can come from a command line. Annotations are too loose to hold tensors and objects to them."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | numbers.Real | dict) or _is_picture(value)


def _is_picture(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "size")


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of anything else itself alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for one in typing.get_args(hint) for kind in _choices(one))
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of this type; true where the type says nothing."""
    return any(_is_a(value, kind) for kind in _choices(hint))


def _is_a(value: Any, kind: Any) -> bool:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in inside
    if origin is collections.abc.Callable:
        return False
    if origin in (list, tuple, collections.abc.Sequence):
        of = [one for one in inside if one is not Ellipsis] or [Any]
        return isinstance(value, list | tuple) and all(any(_fits(item, one) for one in of) for item in value)
    kind = origin or kind
    if not isinstance(kind, type):
        return not isinstance(kind, typing.ForwardRef)
    if issubclass(kind, enum.Enum):
        return value in [one.value for one in kind]
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    return kind is object or isinstance(value, kind)


def _names(hint: Any) -> str:
    found = (kind for kind in _choices(hint) if kind is not type(None))
    return " or ".join(dict.fromkeys(map(_name_of, found)))


def _name_of(kind: Any) -> str:
    if not isinstance(kind, type) or typing.get_origin(kind) is not None:
        return str(kind).replace("typing.", "")
    if issubclass(kind, enum.Enum):
        return " or ".join(repr(one.value) for one in kind)
    return kind.__name__


def _short(value: Any) -> str:
    text = "a picture" if _is_picture(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_sizes(known: Mapping[str, Argument], arguments: Mapping[str, Any], several: bool) -> None:
    def size(name: str) -> int:
        told = arguments.get(name, known[name].default if name in known else None)
        return told if isinstance(told, int) and not isinstance(told, bool) else 1

    for name in (*_EDGES, "num_frames", _CLIPS, _STEPS):
        if size(name) < 1:
            raise ConfigError(f"{name} is {size(name)}; give a whole number of at least 1")
    for name in _EDGES:
        if size(name) > LONGEST_EDGE:
            raise ConfigError(f"{name} is {size(name)}; H.264 video has at most {LONGEST_EDGE} pixels a side")
    if size(_CLIPS) > 1 and not several:
        raise ConfigError(f"{_CLIPS} is {size(_CLIPS)}, and this takes one clip of a prompt; leave it out")
    frames = size("num_frames") * size("height") * size("width") * size(_CLIPS)
    # three colors, as float32, is how pipelines return them
    wanted, there = 12 * frames / 2**30, main_memory_gib()
    if there is not None and wanted > there:
        raise ConfigError(
            f"{size('num_frames') * size(_CLIPS)} frames of {size('width')}x{size('height')} take"
            f" {wanted:,.0f} GiB as pixels alone, and this machine has {there:,.0f}; ask for fewer or"
            " smaller frames"
        )


def _check_steps(pipe: Any, arguments: Mapping[str, Any]) -> None:
    steps = arguments.get(_STEPS)
    levels = getattr(getattr(getattr(pipe, "scheduler", None), "config", None), "num_train_timesteps", None)
    if isinstance(steps, int) and isinstance(levels, int) and steps > levels:
        raise ConfigError(
            f"{_STEPS} is {steps}, and the scheduler knows {levels} noise levels; give 1 to {levels} (20 to 50 are"
            " usual)"
        )


def _check_positions(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """A video needs a token, and some transformers know no more positions than a table of theirs has.

    Outside of these bounds pipelines fail somewhere in a tensor operation.
    """
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    patch, places = getattr(config, "patch_size", 1), getattr(config, "rope_max_seq_len", None)
    edges = [patch] * 2 if isinstance(patch, int) else list(patch)[-2:]
    space = next((getattr(pipe, name) for name in _SPACE if isinstance(getattr(pipe, name, None), int)), 1)
    for name, edge in zip(_EDGES, edges, strict=True):
        told, one = arguments.get(name), edge * space
        if isinstance(told, int) and told < one:
            raise ConfigError(f"{name} is {told}; a token of this model is {one} pixels, so give at least that")
        if isinstance(told, int) and isinstance(places, int) and told > places * one:
            raise ConfigError(f"{name} is {told}; the model knows positions up to {places * one}, so give at most that")
    told, time = arguments.get("num_frames"), getattr(pipe, "vae_scale_factor_temporal", None)
    if isinstance(told, int) and isinstance(places, int) and isinstance(time, int):
        most = (places * (1 if isinstance(patch, int) else patch[0]) - 1) * time + 1
        if told > most:
            raise ConfigError(f"num_frames is {told}; the model knows positions up to {most}, so give at most that")
