"""What a pipeline returned: every clip with its sound, and a sentence for whatever has no place in a video file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError, VidaccelError
from .video import Frames, Sound, to_frames

__all__ = ["Video", "read_output"]

#: What pipelines of diffusers call the videos and the sound that they return.
_FRAMES = ("frames", "videos", "video")
_SOUND = ("audio", "sound")
#: What belongs to one of these and is not lost.
_BESIDE = ("sampling_rate",)


@dataclass(frozen=True)
class Video:
    """One clip.

    Args:
        frames: its pictures.
        sound: ``None`` if it is silent.
    """

    frames: Frames
    sound: Sound | None = None


def read_output(pipe: Any, output: Any) -> tuple[tuple[Video, ...], tuple[str, ...]]:
    """All clips of a pipeline's output, and what is to be said about it.

    Raises:
        ConfigError: there is no video in it.
        VidaccelError: the pixels or the sound are no numbers, or there is not a sound for each clip.
    """
    fields = _fields(output)
    name = next((name for name in _FRAMES if fields.get(name) is not None and len(fields[name])), None)
    if name is None:
        others = ", ".join(key for key, value in fields.items() if value is not None) or type(output).__name__
        raise ConfigError(f"{type(pipe).__name__} returned no frames, only {others}; give a pipeline that makes videos")
    clips = [_to_sdr(clip) if _is_hdr(pipe) else clip for clip in _clips(fields[name])]
    notes = [_HDR] if _is_hdr(pipe) else []
    heard = next((word for word in _SOUND if fields.get(word) is not None), None)
    sounds: list[Sound | None] = [None] * len(clips)
    if heard is not None:
        rate = _sample_rate(pipe, fields)
        if rate is None:
            notes.append(
                f"{type(pipe).__name__} returned {heard}, and nothing tells its sample rate, so it is not in the file"
            )
        else:
            sounds = [Sound(samples, rate) for samples in _waveforms(fields[heard], len(clips))]
    if not _is_state(output):  # a modular pipeline's state holds everything it went through, not only results
        known = {*_FRAMES, *_SOUND, *_BESIDE}
        lost = [key for key, value in fields.items() if value is not None and key not in known]
        if lost:
            notes.append(f"the pipeline also returned {', '.join(lost)}, which a video file has no place for")
    videos = [Video(to_frames(frames), sound) for frames, sound in zip(clips, sounds, strict=True)]
    return tuple(videos), tuple(notes)


def _is_state(output: Any) -> bool:
    return type(output).__name__ == "PipelineState"


def _fields(output: Any) -> Mapping[str, Any]:
    if _is_state(output):
        return output.values  # type: ignore[no-any-return]
    if isinstance(output, Mapping):  # as diffusers' BaseOutput is, without what is None
        return output
    return vars(output) if hasattr(output, "__dict__") else {}


def _clips(videos: Any) -> list[Any]:
    """The clips of an output, be it of one clip or of several."""
    if isinstance(videos, np.ndarray | torch.Tensor):
        return [videos] if videos.ndim == 4 else list(videos)
    first = videos[0] if len(videos) else None
    return [videos] if hasattr(first, "convert") or getattr(first, "ndim", 0) == 3 else list(videos)  # pictures


def _waveforms(sound: Any, clips: int) -> list[NDArray[np.float32]]:
    """The sound of each clip, [samples, channels]."""
    data = sound.detach().float().cpu().numpy() if isinstance(sound, torch.Tensor) else np.asarray(sound, np.float32)
    if data.ndim == 1 or (data.ndim == 2 and len(data) != clips):
        data = data[None]
    if len(data) != clips or data.ndim not in (2, 3) or 0 in data.shape:
        raise VidaccelError(f"the pipeline returned sound of shape {list(data.shape)} for {clips} clips")
    bad = int(data.size - np.isfinite(data).sum())
    if bad:
        raise VidaccelError(f"{bad} of {data.size} samples of sound are NaN or infinite; try --dtype float32")
    return [np.ascontiguousarray(np.atleast_2d(one).T, dtype=np.float32) for one in data]


def _sample_rate(pipe: Any, fields: Mapping[str, Any]) -> int | None:
    """Samples a second, from where the pipelines themselves say to take it."""
    told = fields.get("sampling_rate")
    if told is None:  # LTX-2: its vocoder's rate, not that of its audio VAE
        told = getattr(getattr(getattr(pipe, "vocoder", None), "config", None), "output_sampling_rate", None)
    if told is None:  # Kandinsky 6
        told = getattr(pipe, "audio_sample_rate", None)
    if told is None:  # Cosmos 3
        told = getattr(getattr(getattr(pipe, "sound_tokenizer", None), "config", None), "sampling_rate", None)
    return None if told is None else int(told)


_HDR = (
    "the pipeline returns linear light of any brightness, and the file has standard range: what is brighter than white"
    " is white, and the rest is encoded as sRGB"
)


def _is_hdr(pipe: Any) -> bool:
    return getattr(pipe, "hdr_video_processor", None) is not None


def _to_sdr(light: Any) -> NDArray[np.float32]:
    """Linear light as sRGB, the way diffusers' ``encode_hdr_tensor_to_mp4`` does it."""
    linear = np.clip(np.asarray(light, np.float32), 0.0, 1.0)
    curve = 1.055 * np.power(linear, 1.0 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curve).astype(np.float32)
