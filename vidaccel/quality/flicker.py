"""Temporal flicker: how far the changes from frame to frame differ between two videos."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .metrics import check_same_size

__all__ = ["flicker"]


def flicker(video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float | None:
    """Mean of \\|(v[t+1] - v[t]) - (r[t+1] - r[t])\\| over frames, pixels and channels, in grey levels of 255.

    A still difference (a shifted background, a tint) counts nothing here, however large; a difference that comes and
    goes counts, however small. Zero for identical videos; ``None`` for a single frame, which cannot flicker.

    Args:
        video, reference: [T, H, W, 3] uint8.

    Raises:
        ConfigError: the videos differ in shape.
    """
    check_same_size(video, reference)
    if len(video) < 2:
        return None
    # error[t+1] - error[t] is the same difference of differences; one frame at a time, because clips are long
    total = 0.0
    before = _error(video, reference, 0)
    for index in range(1, len(video)):
        after = _error(video, reference, index)
        total += float(np.abs(after - before).mean())
        before = after
    return total / (len(video) - 1)


def _error(video: NDArray[np.uint8], reference: NDArray[np.uint8], index: int) -> NDArray[np.int16]:
    return video[index].astype(np.int16) - reference[index].astype(np.int16)
