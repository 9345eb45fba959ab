"""Frames to an .mp4 that browsers play, and back."""

from __future__ import annotations

from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from vidaccel.errors import ConfigError, OutputError, VidaccelError
from vidaccel.pipelines.video import even_size_note, to_frames, write_video


def gradient(count: int, height: int, width: int) -> np.ndarray:
    """A smooth clip that H.264 keeps nearly exactly, different in every frame."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    channels = (40 + 10 * t + 0 * y, 60 + 120 * y / height, 60 + 120 * x / width)
    return np.stack(np.broadcast_arrays(*channels), axis=-1).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """All frames of a file, RGB, by OpenCV."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        good, frame = capture.read()
        if not good:
            return np.stack(frames)
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 48), (33, 47), (16, 16)], ids=lambda n: str(n))
def test_opencv_reads_back_what_was_written(tmp_path: Path, height: int, width: int) -> None:
    frames = gradient(7, height, width)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    back = read(tmp_path / "a.mp4")
    assert back.shape == (7, height + height % 2, width + width % 2, 3)
    inside = back[:, :height, :width].astype(int)
    assert np.abs(inside - frames).mean() < 3  # colour is stored at half resolution
    if width % 2:  # the added column repeats the last one, nothing was resized
        assert np.abs(back[:, :, -1].astype(int) - back[:, :, -2]).mean() < 6
    assert (even_size_note(height, width) is None) == (height % 2 == width % 2 == 0)


def test_the_file_is_what_browsers_play(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", gradient(5, 32, 32), fps=12.5)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    facts = next(reader)
    reader.close()
    assert facts["codec"] == "h264" and facts["pix_fmt"].startswith("yuv420p")
    assert facts["fps"] == 12.5
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first, so that playing starts at once"


def test_bad_outputs_are_refused(tmp_path: Path) -> None:
    frames = gradient(2, 16, 16)
    with pytest.raises(OutputError, match=r"does not end in \.mp4"):
        write_video(tmp_path / "a.gif", frames, fps=8)
    with pytest.raises(OutputError, match="does not exist"):
        write_video(tmp_path / "no" / "a.mp4", frames, fps=8)
    with pytest.raises(ConfigError, match="fps is 0"):
        write_video(tmp_path / "a.mp4", frames, fps=0)
    assert list(tmp_path.iterdir()) == []


def test_what_ffmpeg_could_not_finish_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """imageio's writer once left a truncated file in place on a full disk, since it drops ffmpeg's exit status."""
    script = tmp_path / "ffmpeg"
    script.write_text('#!/bin/sh\nfor last; do :; done\ncat > "$last"\necho "No space left on device" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))
    with pytest.raises(OutputError, match=r"could not write .*a\.mp4: No space left on device"):
        write_video(tmp_path / "a.mp4", gradient(2, 16, 16), fps=8)
    assert list(tmp_path.iterdir()) == [script]


def test_floats_are_rounded_and_clipped() -> None:
    video = np.array([0.0, 1.0, 0.5, -0.2, 1.3, 0.999]).reshape(1, 1, 2, 3)
    assert to_frames(video).ravel().tolist() == [0, 255, 128, 0, 255, 255]


def test_pil_images_are_frames_too() -> None:
    frames = gradient(3, 8, 10)
    assert np.array_equal(to_frames([Image.fromarray(frame) for frame in frames]), frames)


def test_pixels_that_are_no_numbers_are_an_error_not_black() -> None:
    video = np.full((1, 2, 2, 3), 0.5)
    video[0, 0, 0, 0] = np.nan
    with pytest.raises(VidaccelError, match="1 of 12 pixel values are NaN"):
        to_frames(video)
    with pytest.raises(ConfigError, match=r"shape \[2, 2, 3\]"):
        to_frames(video[0])
