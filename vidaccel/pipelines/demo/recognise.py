"""Reads colour, shape and motion off a clip, with no knowledge of how the clip was made.

A small template matcher, independent of the generating model: it looks at pixels only. It stands in for the person
who is shown a clip and asked what is there, and like that person it may answer "nothing clear" (``None``).

- *Foreground*: pixels brighter than any background of the demo clips can be, in their strongest channel.
- *Colour*: the named colour nearest to the median foreground pixel.
- *Shape*: the foreground of each frame, moved to the middle and scaled to a fixed area, is compared by intersection
  over union with templates of the shapes at all angles.
- *Motion*: the track (x, y, radius) of the foreground is compared with the ideal track of every motion and with
  standing still.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vidaccel.pipelines.demo.clips import COLOURS, GROUND, HOP, LARGE, ORBIT, SMALL, TRAVEL, TURN, ClipSpec

Array = NDArray[np.float32]

BRIGHT = 0.66  # strongest channel of a foreground pixel, in [0, 1]; backgrounds stay below 0.6
CANVAS = 48  # side of the canvas on which shapes are compared, pixels
CANVAS_AREA = 0.22 * CANVAS * CANVAS  # area to which every foreground is scaled, pixels
STEP_DEGREES = 6  # spacing of the template angles
MIN_PIXELS = 0.004  # foreground below this share of the frame counts as absent
MIN_OVERLAP = 0.72  # mean intersection over union below which no shape is clear
MAX_TRACK_ERROR = 0.11  # root mean square distance to the best ideal track above which no motion is clear
SYMMETRY = {"circle": STEP_DEGREES, "square": 90, "triangle": 120}  # a turn by this many degrees looks like none


@dataclass(frozen=True)
class Reading:
    """What was read off a clip; ``None`` where nothing is clear.

    ``wholeness`` is the mean share of the foreground that hangs together in one piece: an object that appears twice,
    or in crumbs, has a low one.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    wholeness: float
    overlap: float
    track_error: float

    def agrees(self, spec: ClipSpec) -> dict[str, bool]:
        """Which of colour, shape and motion are as ``spec`` says."""
        return {
            "colour": self.colour == spec.colour,
            "shape": self.shape == spec.shape,
            "motion": self.motion == spec.motion,
        }


def read_clip(clip: Tensor) -> Reading:
    """Read one clip of shape (3, frames, height, width) in [-1, 1], height equal to width."""
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[2] != clip.shape[3]:
        raise ValueError(f"expected a clip of shape (3, frames, side, side), got {tuple(clip.shape)}")
    pixels = ((clip.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 3, 0).numpy()
    masks = pixels.max(axis=-1) > BRIGHT
    present = masks.mean(axis=(1, 2)) > MIN_PIXELS
    if present.sum() < 0.75 * len(masks):
        return Reading(None, None, None, 0.0, 0.0, math.inf)
    wholeness = float(np.mean([_largest_share(mask) for mask in masks[present]]))
    mean_overlap = _match_shapes(masks[present]).mean(axis=1)
    names = list(_templates())
    best = int(mean_overlap.argmax())
    motion, error = _match_track(masks[present], np.flatnonzero(present), len(masks))
    clear = mean_overlap[best] >= MIN_OVERLAP
    return Reading(
        colour=_colour(pixels[masks]),
        shape=names[best] if clear else None,
        motion=motion if error <= MAX_TRACK_ERROR else None,
        wholeness=wholeness,
        overlap=float(mean_overlap[best]),
        track_error=error,
    )


def _colour(foreground: Array) -> str:
    """The named colour nearest to the median of ``foreground`` (pixels, 3) in hue and saturation."""

    def chroma(rgb: Array) -> Array:
        # Brightness is divided out: a darker red is still red.
        return rgb / max(float(rgb.max()), 1e-6)

    seen = chroma(np.median(foreground, axis=0).astype(np.float32))
    return min(COLOURS, key=lambda name: float(np.linalg.norm(chroma(np.asarray(COLOURS[name], np.float32)) - seen)))


def _largest_share(mask: NDArray[np.bool_]) -> float:
    """Share of the foreground that lies in its largest connected piece."""
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return float(stats[1:count, cv2.CC_STAT_AREA].max() / mask.sum())


@lru_cache(maxsize=1)
def _templates() -> dict[str, Array]:
    """Shape name -> its outlines on the canvas at every angle of its symmetry: (angle, CANVAS * CANVAS)."""
    # Four times finer than the canvas, then averaged: smooth edges.
    fine = (np.arange(CANVAS * 4, dtype=np.float32) + 0.5) / 4 - CANVAS / 2
    x, y = np.meshgrid(fine, fine)
    found: dict[str, Array] = {}
    for name in ("circle", "square", "triangle"):
        turns = []
        for degrees in range(0, SYMMETRY[name], STEP_DEGREES):
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            u, v = x * cos + y * sin, y * cos - x * sin
            distance = {
                "circle": np.hypot(u, v),
                "square": np.maximum(np.abs(u), np.abs(v)),
                "triangle": np.maximum(math.sqrt(3) / 2 * np.abs(u) - 0.5 * v, v),
            }[name]
            inside = (distance < 12).astype(np.float32)
            turns.append(_normalise(inside).reshape(-1))
        found[name] = np.stack(turns)
    return found


def _normalise(mask: Array) -> Array:
    """Move the centroid of ``mask`` to the middle of the canvas and scale its area to :data:`CANVAS_AREA`."""
    y, x = np.nonzero(mask > 0.5)
    scale = math.sqrt(CANVAS_AREA / len(x))
    shift = [CANVAS / 2 - 0.5 - scale * x.mean(), CANVAS / 2 - 0.5 - scale * y.mean()]
    move = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], np.float32)
    return np.asarray(cv2.warpAffine(mask.astype(np.float32), move, (CANVAS, CANVAS), flags=cv2.INTER_LINEAR))


def _match_shapes(masks: NDArray[np.bool_]) -> Array:
    """Best overlap over all angles for every template family and frame: (family, frame)."""
    seen = np.stack([_normalise(mask.astype(np.float32)).reshape(-1) for mask in masks])
    overlaps = []
    for family in _templates().values():
        common = np.minimum(family[:, None], seen[None]).sum(-1)
        overlap = common / (family.sum(-1)[:, None] + seen.sum(-1)[None] - common)
        overlaps.append(overlap.max(0))
    return np.stack(overlaps)


def _match_track(masks: NDArray[np.bool_], frames: NDArray[np.intp], total: int) -> tuple[str | None, float]:
    """The motion whose ideal track is nearest (``None``: standing still), and the distance in fractions of the side."""
    side = masks.shape[-1]
    centres = (np.arange(side) + 0.5) / side
    area = masks.mean(axis=(1, 2))
    x = (masks.mean(axis=1) @ centres) / (area * side)
    y = (masks.mean(axis=2) @ centres) / (area * side)
    track = np.stack([x, y, np.sqrt(area / math.pi)])
    time = frames / max(total - 1, 1)
    journey = 0.5 + TRAVEL * time
    grow, steady = SMALL + (LARGE - SMALL) * time, track[2].mean() + 0 * time
    shrink = grow[::-1] * (track[2].mean() / grow[::-1].mean())  # a triangle covers less than a circle of its size
    grow = grow * (track[2].mean() / grow.mean())
    hops = GROUND - HOP * np.abs(np.sin(2 * math.pi * time))
    round_x, round_y = ORBIT * np.sin(TURN * time), -ORBIT * np.cos(TURN * time)
    # Across the direction of motion the ideal is the track's own mean: where a shape travels is not part of the name.
    ideals = {
        None: (x.mean() + 0 * time, y.mean() + 0 * time, steady),
        "moving right": (journey, y.mean() + 0 * time, steady),
        "moving left": (1 - journey, y.mean() + 0 * time, steady),
        "moving down": (x.mean() + 0 * time, journey, steady),
        "moving up": (x.mean() + 0 * time, 1 - journey, steady),
        "bouncing": (x.mean() + 0 * time, hops, steady),
        "circling": (x.mean() + round_x - round_x.mean(), y.mean() + round_y - round_y.mean(), steady),
        "growing": (x.mean() + 0 * time, y.mean() + 0 * time, grow),
        "shrinking": (x.mean() + 0 * time, y.mean() + 0 * time, shrink),
    }
    errors = {name: float(np.sqrt(((track - np.stack(ideal)) ** 2).sum(0).mean())) for name, ideal in ideals.items()}
    best = min(errors, key=lambda name: errors[name])
    return best, errors[best]
