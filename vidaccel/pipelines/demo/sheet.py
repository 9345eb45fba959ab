"""Contact sheets: one row of frames for each clip."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BAR = 16  # height of the caption above a row, pixels
GAP = 2  # between frames, pixels


def contact_sheet(
    clips: Sequence[Tensor], captions: Sequence[str], *, every: int = 2, columns: int = 1
) -> NDArray[np.uint8]:
    """Draw ``clips``, each (3, frames, height, width) in [-1, 1], under their ``captions``.

    ``every`` n-th frame is shown; rows are set in ``columns`` columns. Returns an RGB image (height, width, 3).
    """
    if len(clips) != len(captions):
        raise ValueError(f"{len(clips)} clips, but {len(captions)} captions")
    rows = [_row(clip, caption, every) for clip, caption in zip(clips, captions, strict=True)]
    while len(rows) % columns:
        rows.append(np.full_like(rows[0], 255))
    lines = [np.concatenate(rows[i : i + columns], axis=1) for i in range(0, len(rows), columns)]
    return np.concatenate(lines, axis=0)


def save_sheet(
    path: Path, clips: Sequence[Tensor], captions: Sequence[str], *, every: int = 2, columns: int = 1
) -> None:
    """Write a contact sheet as an image file; the suffix of ``path`` says which kind."""
    image = contact_sheet(clips, captions, every=every, columns=columns)
    if not cv2.imwrite(str(path), image[:, :, ::-1]):
        raise OSError(f"could not write {path}")


def _row(clip: Tensor, caption: str, every: int) -> NDArray[np.uint8]:
    pixels = ((clip[:, ::every].detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    frames = pixels.permute(1, 2, 3, 0).numpy()
    strip = np.concatenate(
        [np.pad(frame, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for frame in frames], axis=1
    )
    bar = np.full((BAR, strip.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, caption, (2, BAR - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, strip], axis=0)
