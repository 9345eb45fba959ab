"""Whatever a pipeline returns: all clips, their sound, and a sentence for what is neither."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.probe import AAC_FRAME, probe
from vidaccel.errors import ConfigError, VidaccelError
from vidaccel.pipelines.outputs import read_output
from vidaccel.pipelines.video import Sound, write_video

CLIPS = np.linspace(0, 1, 2 * 3 * 4 * 6 * 3, dtype=np.float32).reshape(2, 3, 4, 6, 3)
SILENT = SimpleNamespace()
#: Says its rate the way LTX-2 does; that of its audio VAE is another.
HEARD = SimpleNamespace(
    vocoder=SimpleNamespace(config=SimpleNamespace(output_sampling_rate=24000)), audio_sampling_rate=16000
)


def pictures(clip: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(np.rint(frame * 255).astype(np.uint8)) for frame in clip]


@pytest.mark.parametrize(
    "frames",
    [CLIPS, list(CLIPS), [pictures(clip) for clip in CLIPS], [list(clip) for clip in CLIPS]],
    ids=["array", "arrays", "pictures", "lists of arrays"],
)
def test_all_clips_are_there(frames: Any) -> None:
    videos, notes = read_output(SILENT, SimpleNamespace(frames=frames))
    assert len(videos) == 2 and not notes
    for video, clip in zip(videos, CLIPS, strict=True):
        assert np.array_equal(video.frames, np.rint(clip * 255)) and video.sound is None


@pytest.mark.parametrize("frames", [CLIPS[0], pictures(CLIPS[0])], ids=["array", "pictures"])
@pytest.mark.parametrize("name", ["frames", "videos", "video"])
def test_one_clip_without_a_list_around_it(frames: Any, name: str) -> None:
    (video,), _ = read_output(SILENT, SimpleNamespace(**{name: frames}))
    assert np.array_equal(video.frames, np.rint(CLIPS[0] * 255))


@pytest.mark.parametrize(
    ("clips", "sound", "channels"),
    [
        (1, torch.zeros(1, 2, 50), 2),
        (1, torch.zeros(1, 50), 1),
        (1, torch.zeros(2, 50), 2),  # Cosmos 3: one clip, no batch
        (1, torch.zeros(50), 1),
        (2, torch.zeros(2, 50), 1),
        (2, torch.zeros(2, 2, 50, dtype=torch.bfloat16), 2),
    ],
)
def test_every_clip_has_its_sound(clips: int, sound: torch.Tensor, channels: int) -> None:
    videos, notes = read_output(HEARD, SimpleNamespace(frames=CLIPS[:clips], audio=sound))
    assert len(videos) == clips and not notes
    for video in videos:
        assert video.sound is not None and video.sound.rate == 24000 and video.sound.samples.shape == (50, channels)


def test_channels_and_clips_are_not_mixed_up() -> None:
    sound = torch.arange(2 * 2 * 5.0).reshape(2, 2, 5) / 20
    videos, _ = read_output(HEARD, SimpleNamespace(frames=CLIPS, audio=sound))
    assert all(video.sound is not None for video in videos)
    assert np.array_equal(videos[1].sound.samples[:, 0], sound[1, 0])  # type: ignore[union-attr]


def test_the_state_of_a_modular_pipeline_says_the_rate_itself() -> None:
    """As MiniMax-H3's and Cosmos 3's blocks leave it, among all that they went through."""
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    for name in ("audio", "sound"):
        state = PipelineState()
        left = {"videos": CLIPS[:1], name: torch.zeros(1, 2, 50), "sampling_rate": 32000, "latents": 1}
        for key, value in left.items():
            state.set(key, value)
        (video,), notes = read_output(SILENT, state)
        assert video.sound is not None and video.sound.rate == 32000 and video.sound.samples.shape == (50, 2)
        assert not notes


def test_sound_that_cannot_be_written_is_no_silence() -> None:
    with pytest.raises(VidaccelError, match=r"sound of shape \[3, 2, 5\] for 2 clips"):
        read_output(HEARD, SimpleNamespace(frames=CLIPS, audio=torch.zeros(3, 2, 5)))
    with pytest.raises(VidaccelError, match="1 of 10 samples of sound are NaN"):
        read_output(HEARD, SimpleNamespace(frames=CLIPS[:1], audio=torch.tensor([[0.0] * 9 + [float("nan")]])))
    videos, notes = read_output(SILENT, SimpleNamespace(frames=CLIPS[:1], audio=torch.zeros(1, 10)))
    assert videos[0].sound is None and "nothing tells its sample rate" in notes[0]


def test_what_else_comes_is_named() -> None:
    _, notes = read_output(SILENT, SimpleNamespace(frames=CLIPS, depth=CLIPS, nothing=None))
    assert notes == ("the pipeline also returned depth, which a video file has no place for",)


@pytest.mark.parametrize("output", [SimpleNamespace(images=[1]), SimpleNamespace(frames=[]), SimpleNamespace()])
def test_no_video_is_an_error(output: Any) -> None:
    with pytest.raises(ConfigError, match="SimpleNamespace returned no frames, only "):
        read_output(SILENT, output)


def test_linear_light_is_encoded_as_srgb() -> None:
    light = np.full((1, 1, 2, 2, 3), 0.0, np.float32)
    light[0, 0, 0, 0], light[0, 0, 0, 1], light[0, 0, 1, 0] = ((0.6 + 0.055) / 1.055) ** 2.4, 1.0, 50.0
    (video,), notes = read_output(SimpleNamespace(hdr_video_processor=1), SimpleNamespace(frames=light))
    assert video.frames[0, ..., 0].tolist() == [[round(0.6 * 255), 255], [255, 0]]
    assert "linear light" in notes[0]


@pytest.mark.parametrize("seconds", [0.4, 1.0, 2.3], ids="{} s".format)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 2), (24000, 1), (44100, 1), (48000, 2)])
def test_frames_and_sound_are_written_to_their_ends(tmp_path: Path, seconds: float, rate: int, channels: int) -> None:
    """Also where one is longer than the other: nothing is cut to the shorter one."""
    frames = np.zeros((10, 32, 48, 3), np.uint8)
    times = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * pitch * times) / 2 for pitch in (220, 330)[:channels]]
    sound = Sound(np.stack(tones, axis=1).astype(np.float32), rate)
    write_video(tmp_path / "a.mp4", frames, 10, sound)
    found = probe(tmp_path / "a.mp4")
    assert (found.frames, found.fps, found.rate, found.channels) == (10, 10, rate, channels)
    assert found.sound is not None and len(times) <= len(found.sound) < len(times) + 2 * AAC_FRAME
    for mine, theirs in zip(sound.samples.T, found.sound[: len(times)].T, strict=True):
        assert np.corrcoef(mine, theirs)[0, 1] > 0.99, "in place, in time, and each channel its own"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_no_sound_no_stream(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8)
    assert probe(tmp_path / "a.mp4").rate is None
    empty = Sound(np.zeros((0, 2), np.float32), 8000)
    with pytest.raises(ConfigError, match="a sound without samples"):
        write_video(tmp_path / "b.mp4", np.zeros((3, 16, 16, 3), np.uint8), 8, empty)
