"""Contact sheets hold the frames they show."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from vidaccel.errors import ConfigError, OutputError
from vidaccel.report.sheets import Strip, contact_sheet, difference, pick_frames, strip_of, write_png

PAIR = {"prompt": "a cat", "psnr": 20.0, "ssim": 0.9, "density": 0.3, "speedup": {"total": 1.5}}


def plain(count: int, *values: int) -> np.ndarray:
    """``count`` frames of 24x32, each of one colour."""
    frames = np.zeros((count, 24, 32, 3), np.uint8)
    frames[:] = values
    return frames


def test_frames_are_picked_evenly_with_both_ends() -> None:
    video = np.arange(17, dtype=np.uint8).reshape(17, 1, 1, 1).repeat(3, axis=-1)
    assert pick_frames(video, 5)[:, 0, 0, 0].tolist() == [0, 4, 8, 12, 16]
    assert len(pick_frames(video, 30)) == 17


def test_differences_are_strengthened_and_saturate() -> None:
    assert difference(plain(1, 10, 0, 200), plain(1, 15, 0, 0))[0, 0, 0].tolist() == [20, 0, 255]


def test_every_row_shows_its_video() -> None:
    strip = strip_of(PAIR, plain(3, 200, 10, 10), plain(3, 10, 200, 10))
    assert [label for label, _ in strip.rows] == ["dense", "plan", "diff x4"]
    sheet = contact_sheet([strip])
    for colour in ((200, 10, 10), (10, 200, 10), (255, 255, 0)):
        share = (sheet == colour).all(axis=-1).mean()
        assert share > 0.15, colour


def test_strips_of_several_sizes_share_a_sheet() -> None:
    one, two = strip_of(PAIR, plain(2, 1, 2, 3), plain(2, 1, 2, 3)), Strip("b", (("wide", plain(8, 9, 9, 9)[:, :6]),))
    sheet = contact_sheet([one, two])
    assert sheet.shape[1] == contact_sheet([two]).shape[1]
    assert sheet.shape[0] == contact_sheet([one]).shape[0] + contact_sheet([two]).shape[0]
    with pytest.raises(ConfigError, match="no videos"):
        contact_sheet([])


def test_png_keeps_colours(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", plain(1, 200, 10, 20)[0])
    assert cv2.imread(str(tmp_path / "a.png"))[0, 0].tolist() == [20, 10, 200]  # OpenCV reads BGR
    with pytest.raises(OutputError, match="name it a.png"):
        write_png(tmp_path / "a.jpg", plain(1, 0, 0, 0)[0])
