"""The arguments of the pipeline's call, from the options of a command: read once, and checked before loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from .options import Opened

__all__ = ["call_arguments", "check_early", "input_files", "read_image", "read_media"]

#: Options that go to the pipeline's call as they are.
_CALL_OPTIONS = ("negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")
_MOVING = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
_KEPT = "vidaccel.call_arguments"


def call_arguments(opened: Opened, context: typer.Context, picture: Any) -> dict[str, Any]:
    """The model's defaults, overridden by the command's video options (``None`` = not given) and by NAME=VALUE texts.

    Args:
        context: of a command that has all of these options.
        picture: the image read for ``--image``, or ``None``.
    """
    return {**opened.defaults, **_given(context, picture)}


def check_early(model: str | None, context: typer.Context, picture: Any, *, several: bool = False) -> None:
    """Finds out before loading, where the folder of ``model`` tells the pipeline's class, whether its call is possible.

    Raises:
        ConfigError: see :func:`vidaccel.pipelines.call_check.check_call`.
    """
    from ..pipelines.call_check import check_call
    from ..pipelines.demo import DEFAULTS, DEMO_DIR
    from ..pipelines.load import pipeline_class

    given = _given(context, picture)
    cls = pipeline_class(DEMO_DIR if model is None else model) if model != "" else None
    if cls is not None:
        defaults = {name: value for name, value in DEFAULTS.items() if model is None and name != "fps"}
        check_call(cls, {**defaults, **given}, several=several)


def input_files(context: typer.Context) -> dict[str, str]:
    """The files that arguments were read from, by name of argument."""
    found = {} if context.params["image"] is None else {"image": str(context.params["image"])}
    for text in context.params["arg"] or ():
        name, _, value = text.partition("=")
        if value.startswith("@"):
            found[_name(name)] = value[1:]
    return found


def _given(context: typer.Context, picture: Any) -> dict[str, Any]:
    """What the user gave; files are read once for a command."""
    if _KEPT not in context.meta:
        context.meta[_KEPT] = _read(context, picture)
    return dict(context.meta[_KEPT])


def _read(context: typer.Context, picture: Any) -> dict[str, Any]:
    given = {**{name: context.params[name] for name in _CALL_OPTIONS}, "image": picture}
    arguments = {name: value for name, value in given.items() if value is not None}
    for text in context.params["arg"] or ():
        name, equals, value = text.partition("=")
        name = _name(name)
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"--arg is {text!r}; give NAME=VALUE, for example max_sequence_length=256, or NAME=@FILE for a picture"
                " or a video"
            )
        if name in arguments:
            raise ConfigError(f"{name} is given twice; leave out one")
        arguments[name] = _value(value)
    return arguments


def _name(text: str) -> str:
    return text.strip().replace("-", "_")


def _value(text: str) -> Any:
    if text.startswith("@"):
        return read_media(Path(text[1:]))
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # plain text needs no quotes


def read_image(path: Path | None) -> Any:
    """The picture at ``path`` as PIL image, or ``None``."""
    if path is None:
        return None
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the image {path} cannot be read: {reason}; give a picture, such as a .png") from error


def read_media(path: Path) -> Any:
    """A picture as PIL image; a video, or the pictures of a folder in the order of their names, as list of them.

    Raises:
        ConfigError: there is no such file, or none of these in it.
    """
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise ConfigError(f"the folder {path} has no pictures in it; give one with the frames of a video")
        return [read_image(file) for file in files]
    if path.suffix.lower() in _MOVING and path.is_file():
        frames = list(_frames(path))
        if not frames:
            raise ConfigError(f"the video {path} has no frames; give another")
        return frames
    return read_image(path)


def _frames(path: Path) -> Iterator[Any]:
    import imageio_ffmpeg
    from PIL import Image

    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        size = next(reader)["size"]
        for data in reader:
            yield Image.frombytes("RGB", size, data)
    except (OSError, RuntimeError, KeyError) as error:  # ffmpeg's own words are many lines
        raise ConfigError(f"the video {path} cannot be read by ffmpeg; give an .mp4") from error
    finally:
        reader.close()
