"""Frames as one array, [T, H, W, 3] uint8, and with their sound as an H.264 file that browsers play."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, OutputError, VidaccelError
from ..files import atomic_path

__all__ = ["LONGEST_EDGE", "Frames", "Sound", "check_video_path", "even_size_note", "to_frames", "write_video"]

#: A video: [T, H, W, 3], uint8, RGB.
Frames = NDArray[np.uint8]

#: Pixels; no H.264 encoder of ffmpeg takes wider or higher frames.
LONGEST_EDGE = 16384


@dataclass(frozen=True)
class Sound:
    """The sound of a clip.

    Args:
        samples: [samples, channels], in [-1, 1].
        rate: samples a second.
    """

    samples: NDArray[np.float32]
    rate: int

    def __str__(self) -> str:
        count, channels = self.samples.shape
        return f"{count / self.rate:.2f} s of sound ({channels} x {self.rate} Hz)"


_KBITS = 160  # of AAC, for each channel: more than it takes to sound like the original
_CRF = 16  # x264's constant quality: visually lossless, so that the file does not hide what a plan changed


def check_video_path(path: Path) -> Path:
    """``path`` if it names an .mp4 file, the one format written here.

    Raises:
        OutputError: for another suffix.
    """
    if path.suffix.lower() != ".mp4":
        raise OutputError(
            f"the output {path} does not end in .mp4, the format vidaccel writes; name it {path.stem}.mp4"
        )
    return path


def to_frames(video: Any) -> Frames:
    """One video of a pipeline's output as `Frames`.

    Args:
        video: floats in [0, 1] or uint8, [T, H, W, 3]; or a list of PIL images.

    Raises:
        ConfigError: it is no such video.
        VidaccelError: it holds NaN or infinite pixels, which would be written as black.
    """
    frames = np.asarray(video) if isinstance(video, np.ndarray) else np.stack([np.asarray(image) for image in video])
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ConfigError(f"the pipeline returned frames of shape {list(frames.shape)}; a video is [T, H, W, 3]")
    if frames.dtype == np.uint8:
        return frames
    bad = int(frames.size - np.isfinite(frames).sum())
    if bad:
        raise VidaccelError(f"{bad} of {frames.size} pixel values are NaN or infinite; try --dtype float32")
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)


def even_size_note(height: int, width: int) -> str | None:
    """What `write_video` does to frames of this size, in one sentence, or ``None`` if it leaves them as they are."""
    if height % 2 == 0 and width % 2 == 0:
        return None
    return (
        f"H.264 needs even sizes, so the {width}x{height} frames are written as {width + width % 2}x"
        f"{height + height % 2} with the last row or column repeated"
    )


def write_video(path: str | Path, frames: Frames, fps: float, sound: Sound | None = None) -> None:
    """Write ``frames`` as an .mp4 file (H.264, yuv420p, index first), whole or not at all; with ``sound`` as AAC.

    Both are written to their ends, whichever is longer. Frames of odd size get their last row or column repeated once,
    since H.264's 4:2:0 colour needs even sizes; nothing is ever resized. `even_size_note` says so in words.

    Raises:
        OutputError: the file cannot be written, or does not end in .mp4.
        ConfigError: ``fps`` is not positive.
    """
    target = check_video_path(Path(path))
    if not 0 < fps < float("inf"):
        raise ConfigError(f"fps is {fps}; give a positive number of frames per second")
    _, height, width, _ = frames.shape
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{padded.shape[2]}x{padded.shape[1]}", "-r", f"{fps:g}"),
        *("-i", "-"),
    ]
    encoded = ("-c:v", "libx264", "-crf", str(_CRF), "-pix_fmt", "yuv420p", "-movflags", "+faststart")
    with atomic_path(target) as temporary, _sound_input(sound) as heard:
        # not imageio's own writer: it drops ffmpeg's exit status, so a full disk would leave half a video
        arguments = [*command, *heard, *encoded, str(temporary)]
        done = subprocess.run(arguments, input=padded.data, capture_output=True, check=False)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise OutputError(f"ffmpeg could not write {target}: {lines[-1]}; choose another output or free the disk")


@contextmanager
def _sound_input(sound: Sound | None) -> Iterator[list[str]]:
    """ffmpeg's arguments for the sound, which lies in a file meanwhile: its standard input brings the frames."""
    if sound is None:
        yield ["-an"]
        return
    count, channels = sound.samples.shape
    if not count:
        raise ConfigError("there is a sound without samples; leave it out")
    with tempfile.NamedTemporaryFile(suffix=".f32le") as file:
        file.write(np.clip(sound.samples, -1.0, 1.0).astype("<f4").tobytes())
        file.flush()
        yield [
            *("-f", "f32le", "-ar", str(sound.rate), "-ac", str(channels), "-i", file.name),
            *("-map", "0:v", "-map", "1:a", "-c:a", "aac", "-ar", str(sound.rate), "-b:a", f"{_KBITS * channels}k"),
        ]
