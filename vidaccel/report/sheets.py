"""Contact sheets: rows of frames under each other, so that one look compares videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, OutputError
from ..files import atomic_path
from .words import figure

__all__ = ["DIFFERENCE_GAIN", "Strip", "contact_sheet", "difference", "pick_frames", "strip_of", "write_png"]

#: An image [H, W, 3] or a video [T, H, W, 3], uint8, RGB.
Pixels = NDArray[np.uint8]

#: Differences are shown this many times as strong, since those that matter are faint.
DIFFERENCE_GAIN = 4

_CELL = 144  # width of a frame on the sheet, pixels
_LABEL = 96  # width of the column of labels
_TITLE = 26  # height of a strip's title
_GAP = 4
_PAPER, _INK = 255, (32, 32, 32)


@dataclass(frozen=True)
class Strip:
    """One titled group of rows.

    Args:
        title: one line above the rows.
        rows: (label, video) pairs; videos are [T, H, W, 3] uint8, all of one size.
    """

    title: str
    rows: tuple[tuple[str, Pixels], ...]


def strip_of(pair: Mapping[str, Any], dense: Pixels, planned: Pixels, *, frames: int = 8) -> Strip:
    """The strip of one comparison: dense, plan, and `DIFFERENCE_GAIN` times their difference.

    Args:
        pair: its figures, `vidaccel.quality.Pair.to_dict`.
        dense, planned: [T, H, W, 3] uint8.
        frames: how many of them to show.
    """
    title = (
        f"{pair['prompt']}   PSNR {figure(pair['psnr'])}, SSIM {figure(pair['ssim'], 3)},"
        f" density {figure(pair['density'])}, speed-up {figure(pair['speedup']['total'], unit='x')}"
    )
    few_dense, few_planned = pick_frames(dense, frames), pick_frames(planned, frames)
    rows = (
        ("dense", few_dense),
        ("plan", few_planned),
        (f"diff x{DIFFERENCE_GAIN}", difference(few_dense, few_planned)),
    )
    return Strip(title, rows)


def pick_frames(video: Pixels, count: int) -> Pixels:
    """``count`` frames of [T, H, W, 3], evenly spaced, first and last included; all frames if there are fewer."""
    if len(video) <= count:
        return video
    return video[np.linspace(0, len(video) - 1, count).round().astype(int)]


def difference(a: Pixels, b: Pixels) -> Pixels:
    """Absolute difference of two videos, times `DIFFERENCE_GAIN`, saturated."""
    apart = np.abs(a.astype(np.int16) - b.astype(np.int16)) * DIFFERENCE_GAIN
    return np.minimum(apart, 255).astype(np.uint8)


def contact_sheet(strips: Sequence[Strip]) -> Pixels:
    """The strips under each other as one image [H, W, 3].

    Raises:
        ConfigError: there are none.
    """
    if not strips:
        raise ConfigError("a contact sheet of no videos; give at least one strip")
    images = [_strip(strip) for strip in strips]
    width = max(image.shape[1] for image in images)
    return np.concatenate([_pasted(image, image.shape[0], width) for image in images])


def write_png(path: str | Path, image: Pixels) -> None:
    """Write an image [H, W, 3] as PNG, whole or not at all.

    Raises:
        OutputError: the file cannot be written, or does not end in .png.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise OutputError(f"the sheet {target} does not end in .png; name it {target.stem}.png")
    good, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert good, "OpenCV encodes any uint8 image as PNG"
    with atomic_path(target) as temporary:
        temporary.write_bytes(data.tobytes())


def _strip(strip: Strip) -> Pixels:
    columns = max(len(video) for _, video in strip.rows)
    first = strip.rows[0][1]
    cell_height = max(1, round(_CELL * first.shape[1] / first.shape[2]))
    width = _LABEL + columns * (_CELL + _GAP)
    title = _text(_pasted(None, _TITLE, width), strip.title, (_GAP, _TITLE - 8), 0.5)
    return np.concatenate([title, *(_row(label, video, cell_height, width) for label, video in strip.rows)])


def _row(label: str, video: Pixels, cell_height: int, width: int) -> Pixels:
    row = _pasted(None, cell_height + _GAP, width)
    for column, frame in enumerate(video):
        # small videos are enlarged without smoothing, so that what they show is what was generated
        method = cv2.INTER_AREA if frame.shape[1] > _CELL else cv2.INTER_NEAREST
        left = _LABEL + column * (_CELL + _GAP)
        row[:cell_height, left : left + _CELL] = cv2.resize(frame, (_CELL, cell_height), interpolation=method)
    return _text(row, label, (_GAP, cell_height // 2), 0.5)


def _pasted(image: Pixels | None, height: int, width: int) -> Pixels:
    """``image`` in the top left corner of blank paper."""
    paper = np.full((height, width, 3), _PAPER, dtype=np.uint8)
    if image is not None:
        paper[: image.shape[0], : image.shape[1]] = image
    return paper


def _text(image: Pixels, text: str, origin: tuple[int, int], size: float) -> Pixels:
    plain = text.encode("ascii", "replace").decode()  # OpenCV's font knows nothing else
    cv2.putText(image, plain, origin, cv2.FONT_HERSHEY_SIMPLEX, size, _INK, 1, cv2.LINE_AA)
    return image
