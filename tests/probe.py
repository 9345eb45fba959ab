"""What is really in a video file, told by ffmpeg itself."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np

__all__ = ["AAC_FRAME", "Probed", "probe"]

#: Samples that AAC codes at once: a stream ends on a whole frame.
AAC_FRAME = 1024


@dataclass(frozen=True)
class Probed:
    """A video file: all its frames and all its sound, decoded."""

    frames: int
    fps: float
    rate: int | None = None
    channels: int = 0
    sound: np.ndarray | None = None  # [samples, channels]


def _ffmpeg(*arguments: str) -> tuple[bytes, str]:
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *arguments], capture_output=True, check=False)
    return done.stdout, done.stderr.decode()


def probe(path: Path) -> Probed:
    """Decodes everything in ``path``."""
    _, told = _ffmpeg("-i", str(path), "-map", "0:v", "-f", "null", "-")
    frames = int(re.findall(r"frame= *(\d+)", told)[-1])
    (fps,) = re.findall(r"Video: h264.* ([0-9.]+) fps", told.split("Output #0")[0])
    heard = re.findall(r"Audio: aac.*?, (\d+) Hz, (mono|stereo)", told.split("Output #0")[0])
    if not heard:
        assert "Audio" not in told, told
        return Probed(frames, float(fps))
    ((rate, layout),) = heard
    channels = {"mono": 1, "stereo": 2}[layout]
    data, _ = _ffmpeg("-v", "error", "-i", str(path), "-map", "0:a", "-f", "f32le", "-")
    return Probed(frames, float(fps), int(rate), channels, np.frombuffer(data, "<f4").reshape(-1, channels))
