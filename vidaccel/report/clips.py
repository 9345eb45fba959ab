"""Videos inside the page: dense, plan and their difference, as H.264 files in data URIs."""

from __future__ import annotations

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..pipelines.video import Frames, write_video
from .sheets import DIFFERENCE_GAIN, difference

__all__ = ["Clip", "clip_of"]


@dataclass(frozen=True)
class Clip:
    """The three videos of one prompt.

    Args:
        prompt: what they show.
        parts: (label, data URI) of dense, plan and difference.
        width, height: of each, in pixels.
    """

    prompt: str
    parts: tuple[tuple[str, str], ...]
    width: int
    height: int


def clip_of(prompt: str, plan: str, dense: Frames, planned: Frames, fps: float) -> Clip:
    """The clip of one pair.

    Args:
        plan: name of the plan.
        dense, planned: [T, H, W, 3] uint8.
        fps: frames per second.

    Raises:
        OutputError: ffmpeg cannot write them.
    """
    apart = difference(dense, planned)
    labels = ("dense", f"plan {plan}", f"difference, {DIFFERENCE_GAIN} times as strong")
    parts = zip(labels, (dense, planned, apart), strict=True)
    _, height, width, _ = dense.shape
    return Clip(prompt, tuple((label, _data_uri(frames, fps)) for label, frames in parts), width, height)


def _data_uri(frames: Frames, fps: float) -> str:
    with tempfile.TemporaryDirectory(prefix="vidaccel-") as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, fps)
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
