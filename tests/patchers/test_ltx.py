"""LTX-2 tokens that precede the video: their number is not told, so the call stays dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidaccel import VideoGrid
from vidaccel.patchers.ltx import LTX2Family

GRID = VideoGrid(2, 3, 4)


def call(tokens: int, first: float | None) -> dict[str, Any]:
    """A call with ``tokens`` tokens, the first of which starts at the time ``first``."""
    coordinates = torch.zeros(1, 3, tokens, 2)
    coordinates[0, 0, 0, 0] = first or 0
    sizes = {"num_frames": 2, "height": 3, "width": 4}
    return {
        "hidden_states": torch.zeros(1, tokens, 8),
        "video_coords": None if first is None else coordinates,
        **sizes,
    }


@pytest.mark.parametrize(
    ("tokens", "first", "known"),
    [(24, 0.0, True), (24, None, True), (30, 0.0, True), (30, 499.5, False), (30, None, False)],
)
def test_echos_memory_before_the_video_is_not_taken_for_video(tokens: int, first: float | None, known: bool) -> None:
    grid = LTX2Family().grid(None, call(tokens, first))
    assert grid == (GRID if known else "other tokens precede the video, and the call does not tell how many")
