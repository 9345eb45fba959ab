"""Procedural captioned clips: one coloured shape, one motion, one background.

This is the whole training set of the demo model. A clip is a function of a :class:`ClipSpec` (what the caption
says) and of a few small random numbers (what the caption does not say: where exactly, how large, which tone of
background). A whole batch is rendered at once with tensor operations, on any device.

The design is deliberately legible, because the model that learns it is tiny:

- lengths are fractions of the frame side, so that a clip looks the same at every resolution;
- objects are large (about 40% of the frame) and what the caption does not say varies little;
- every motion starts and ends at clearly different states;
- what circles goes clockwise around the middle, upright, from the top to the left. Spinning on the spot was tried:
  only corners move, a few pixels that the model never found worth learning, and about a point near its edge an object
  is seen at many angles, of which a model this small drew none cleanly;
- journeys begin in the middle. Across the whole frame, "left" and "right" would differ only in which side goes with
  which time, and after many thousand samples the model still had not found that; this way they differ in the side;
- the light on the background is darker at the top, warmer on the right, and comes up in the course of the clip.
  Attention with rotary embeddings sees only *relative* positions; the light is a hint of where and when a token is.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.80, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.88, 0.10),
    "white": (0.96, 0.96, 0.96),
    "purple": (0.70, 0.15, 0.80),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "circling",
    "growing",
    "shrinking",
)
BACKGROUNDS = ("plain", "striped", "checkered")

# Dark tones of about the same brightness: each of the six colours stands out from each of them.
_TONES = ((0.20, 0.25, 0.33), (0.33, 0.24, 0.18), (0.26, 0.26, 0.26))

TRAVEL = 0.32  # length of a journey, which begins in the middle of the frame
GROUND, HOP = 0.74, 0.46  # a bounce: lowest centre, height of the hop
SMALL, LARGE = 0.08, 0.33  # radii between which a shape grows or shrinks
TURN, ORBIT = 1.5 * math.pi, 0.18  # circling: the whole angle, and how far from the middle


@dataclass(frozen=True, order=True)
class ClipSpec:
    """What a caption says about a clip."""

    colour: str
    shape: str
    motion: str
    background: str

    def __post_init__(self) -> None:
        for value, allowed in zip(
            (self.colour, self.shape, self.motion, self.background),
            (tuple(COLOURS), SHAPES, MOTIONS, BACKGROUNDS),
            strict=True,
        ):
            if value not in allowed:
                raise ValueError(f"unknown word {value!r}; the clips know {', '.join(allowed)}")

    @property
    def caption(self) -> str:
        """The full caption, ``a {colour} {shape} {motion} on a {background} background``."""
        return f"{self.short_caption} on a {self.background} background"

    @property
    def short_caption(self) -> str:
        """The caption without its background: ``a {colour} {shape} {motion}``."""
        return f"a {self.colour} {self.shape} {self.motion}"


# Never trained on, in any phase: the prompts by which the model is judged. Each colour and background is there
# twice or more, each shape four times, each motion at least once.
HELD_OUT: tuple[ClipSpec, ...] = (
    ClipSpec("red", "circle", "moving left", "striped"),
    ClipSpec("blue", "square", "moving up", "checkered"),
    ClipSpec("yellow", "triangle", "circling", "plain"),
    ClipSpec("green", "circle", "growing", "checkered"),
    ClipSpec("white", "square", "bouncing", "plain"),
    ClipSpec("purple", "triangle", "moving right", "striped"),
    ClipSpec("red", "square", "circling", "checkered"),
    ClipSpec("blue", "triangle", "shrinking", "striped"),
    ClipSpec("yellow", "circle", "moving down", "checkered"),
    ClipSpec("green", "triangle", "bouncing", "striped"),
    ClipSpec("white", "circle", "moving right", "plain"),
    ClipSpec("purple", "square", "growing", "plain"),
)


def all_specs() -> tuple[ClipSpec, ...]:
    """All 432 combinations, in a fixed order."""
    return tuple(ClipSpec(*words) for words in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS))


def training_specs() -> tuple[ClipSpec, ...]:
    """All combinations but the held-out ones."""
    return tuple(spec for spec in all_specs() if spec not in HELD_OUT)


def draw_specs(count: int, generator: torch.Generator, specs: Sequence[ClipSpec] | None = None) -> list[ClipSpec]:
    """Draw ``count`` combinations with replacement from ``specs`` (the training ones unless told)."""
    pool = training_specs() if specs is None else specs
    return [pool[i] for i in torch.randint(len(pool), (count,), generator=generator).tolist()]


def render(
    specs: Sequence[ClipSpec],
    generator: torch.Generator,
    *,
    frames: int = 16,
    size: int = 96,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Render one clip for each of ``specs``.

    The few random numbers are drawn from ``generator`` (a CPU generator), so a seed gives the same clips on every
    device, up to rounding.

    Returns a float32 tensor (batch, 3, ``frames``, ``size``, ``size``) in [-1, 1].
    """
    noise = torch.rand(len(specs), 6, generator=generator).to(device)
    time = torch.linspace(0, 1, frames, device=device)
    pixel = (torch.arange(size, device=device) + 0.5) / size
    x, y = pixel[None, None, None, :], pixel[None, None, :, None]  # broadcast against (batch, frame, row, column)

    image = _background(specs, noise, time, pixel)
    centre_x, centre_y, radius, angle = (track[..., None, None] for track in _tracks(specs, noise, time))
    distance = _signed_distance(specs, x - centre_x, y - centre_y, radius, angle)
    cover = (0.5 - distance * size / 1.5).clamp(0, 1)[:, None]  # an edge 1.5 pixels wide
    paint = torch.tensor([COLOURS[s.colour] for s in specs], device=device)[:, :, None, None, None]
    return (image + (paint - image) * cover) * 2 - 1


def _where(specs: Sequence[ClipSpec], field: str, word: str, like: Tensor) -> Tensor:
    """1.0 for the clips whose ``field`` is ``word`` and 0.0 for the others: (batch, 1)."""
    return torch.tensor([[float(getattr(s, field) == word)] for s in specs], device=like.device)


def _tracks(specs: Sequence[ClipSpec], noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, radius (fractions of the side) and angle (radians) of each frame: four (batch, frame)."""
    is_motion = {motion: _where(specs, "motion", motion, noise) for motion in MOTIONS}
    jitter = (noise - 0.5) * 2  # -1 ... 1
    x = 0.5 + 0.05 * jitter[:, 0:1] + 0 * time
    y = 0.5 + 0.05 * jitter[:, 1:2] + 0 * time
    radius = 0.19 + 0.02 * jitter[:, 2:3] + 0 * time
    angle = 0.08 * jitter[:, 3:4] + 0 * time

    journey = 0.5 + TRAVEL * time + 0.03 * jitter[:, 4:5]
    x = torch.lerp(x, journey, is_motion["moving right"])
    x = torch.lerp(x, 1 - journey, is_motion["moving left"])
    y = torch.lerp(y, journey, is_motion["moving down"])
    y = torch.lerp(y, 1 - journey, is_motion["moving up"])
    hops = GROUND + 0.03 * jitter[:, 4:5] - HOP * (2 * math.pi * time).sin().abs()
    y = torch.lerp(y, hops, is_motion["bouncing"])
    x = x + is_motion["circling"] * ORBIT * (TURN * time).sin()
    y = y - is_motion["circling"] * ORBIT * (TURN * time).cos()
    small, large = SMALL + 0.015 * jitter[:, 2:3], LARGE + 0.03 * jitter[:, 4:5]
    radius = torch.lerp(radius, torch.lerp(small, large, time), is_motion["growing"])
    radius = torch.lerp(radius, torch.lerp(large, small, time), is_motion["shrinking"])
    return x, y, radius, angle


def _signed_distance(specs: Sequence[ClipSpec], dx: Tensor, dy: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Distance to the outline, negative inside, in fractions of the side: (batch, frame, row, column)."""
    cos, sin = angle.cos(), angle.sin()
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    square = torch.maximum(u.abs(), v.abs()) - radius * 0.88
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(slope * u.abs() - 0.5 * v, v) - radius * 0.6
    distance = (u * u + v * v).sqrt() - radius
    distance = torch.where(_where(specs, "shape", "square", dx)[..., None, None] > 0, square, distance)
    return torch.where(_where(specs, "shape", "triangle", dx)[..., None, None] > 0, triangle, distance)


def _background(specs: Sequence[ClipSpec], noise: Tensor, time: Tensor, pixel: Tensor) -> Tensor:
    """The background, which changes only with the light: (batch, 3, frame, row, column) in [0, 1]."""
    x, y = pixel.view(1, 1, 1, 1, -1), pixel.view(1, 1, 1, -1, 1)
    when = time.view(1, 1, -1, 1, 1)
    tones = torch.tensor(_TONES, device=noise.device)
    tone = tones[(noise[:, 5] * len(_TONES)).long().clamp(max=len(_TONES) - 1)].view(-1, 3, 1, 1, 1)
    stripes = (0.5 + 1.5 * (2 * math.pi * 4 * x).sin()).clamp(0, 1)
    checks = (0.5 + 3 * (2 * math.pi * 3 * x).sin() * (2 * math.pi * 3 * y).sin()).clamp(0, 1)
    texture = _where(specs, "background", "striped", noise).view(-1, 1, 1, 1, 1) * (stripes - 0.5)
    texture = texture + _where(specs, "background", "checkered", noise).view(-1, 1, 1, 1, 1) * (checks - 0.5)
    # Three axes, three directions of colour: brightness down, red against blue across, green against both in time.
    warm = torch.tensor([1.0, 0.0, -1.0], device=noise.device).view(1, 3, 1, 1, 1)
    green = torch.tensor([-0.5, 1.0, -0.5], device=noise.device).view(1, 3, 1, 1, 1)
    light = tone * (0.6 + 0.8 * y) + 0.08 * warm * (2 * x - 1) + 0.16 * texture
    return (light * (0.6 + 0.5 * when) + 0.07 * green * (2 * when - 1)).clamp(0.02, 0.6)
