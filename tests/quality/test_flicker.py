"""Flicker: a still difference is none, a restless one is, by the formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidaccel.errors import ConfigError
from vidaccel.quality import flicker


def clip(seed: int, frames: int = 5) -> np.ndarray:
    """Random frames; [T, 6, 4, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (frames, 6, 4, 3), dtype=np.uint8)


def test_it_is_the_formula() -> None:
    a, b = clip(0).astype(float), clip(1).astype(float)
    expected = np.abs(np.diff(a, axis=0) - np.diff(b, axis=0)).mean()
    assert flicker(clip(0), clip(1)) == pytest.approx(expected)


def test_a_still_difference_is_no_flicker_and_a_restless_one_is() -> None:
    ground = np.full((6, 8, 8, 3), 100, np.uint8)
    assert flicker(ground + 50, ground) == 0
    restless = ground.copy()
    restless[::2] += 3
    assert flicker(restless, ground) == 3


@given(st.integers(0, 50), st.integers(0, 50), st.integers(2, 6))
def test_it_is_a_distance_of_motions(one: int, other: int, frames: int) -> None:
    a, b = clip(one, frames), clip(other, frames)
    there, back = flicker(a, b), flicker(b, a)
    assert there == back and 0 <= there <= 510
    assert flicker(a, a) == 0
    assert flicker(a[::-1], b[::-1]) == pytest.approx(there), "time has no direction in it"


def test_a_frame_alone_cannot_flicker_and_sizes_must_match() -> None:
    assert flicker(clip(0, 1), clip(1, 1)) is None
    with pytest.raises(ConfigError, match="differ in size"):
        flicker(clip(0), clip(0, 4))
