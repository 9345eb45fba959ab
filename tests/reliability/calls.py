"""Random attention calls, each made from its seed and number alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vidaccel.compensation import build_compensation, compensation_names
from vidaccel.configs.pattern_spec import CompensationSpec, PatternSpec
from vidaccel.configs.plan import HeadPolicy, Plan
from vidaccel.engine.prepare import check_plan
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns.registry import build_pattern, pattern_class, pattern_names
from vidaccel.types import PRECISIONS, TileShape, VideoGrid

__all__ = ["LEFT_OUT", "Case", "draw_case"]

#: Patterns and compensations that a random call cannot have, and why.
LEFT_OUT: dict[str, str] = {"seer": "needs a trained gate"}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORAGE = ("plain", "heads first", "fused", "channels first", "slice", "one sample for all")
_VALUES = ("normal", "normal", "normal", "peaked", "even", "outlier channel", "constant head", "zeros", "alike tokens")

Draw = Callable[[random.Random], Any]


def _share(draw: random.Random) -> float:
    return round(draw.uniform(0.03, 1.0), 3)


def _extent(draw: random.Random) -> int | float:
    return draw.choice([draw.randrange(1, 5), round(draw.uniform(0.1, 1.0), 2), 1.0])


def _extents(draw: random.Random) -> tuple[int | float, ...]:
    return tuple(_extent(draw) for _ in range(3))


def _window(draw: random.Random) -> PatternSpec:
    return PatternSpec.make("sliding_tile", window=_extents(draw))


def _static(draw: random.Random) -> PatternSpec:
    names = [n for n in pattern_names() if not pattern_class(PatternSpec(n)).dynamic and n not in ("union", "dense")]
    return _spec(draw, draw.choice(names))


def _dynamic(draw: random.Random) -> PatternSpec:
    return _spec(draw, draw.choice(["pooled_top_k", "pooled_top_p", "error_routing", "sparge", "draft"]))


#: What required parameters get, by name; a pattern of its own meaning of a name is in :data:`_OPTIONS`.
_REQUIRED: dict[str, Draw] = {
    "density": _share,
    "window": _extents,
    "pattern": _dynamic,
    "patterns": lambda draw: tuple(_static(draw) for _ in range(draw.randrange(1, 4))),
}

#: Optional parameters, drawn in half of the cases each.
_OPTIONS: dict[str, Mapping[str, Draw]] = {
    "anchor": {"margin": lambda d: d.choice([0.0, 0.5, 5.0])},
    "first_frame_sink": {"frames": _extent, "queries": lambda d: d.random() < 0.5},
    "hash_buckets": {"bits": lambda d: d.randrange(1, 11), "rounds": lambda d: d.randrange(1, 6)},
    "hierarchical": {"group": lambda d: tuple(d.randrange(1, 4) for _ in range(3)), "wide": lambda d: d.uniform(1, 4)},
    "minference": {"rows": lambda d: d.randrange(1, 100)},
    "neighborhood": {
        "stride": lambda d: d.choice(["tile", (1, 2, 2), (2, 1, 3)]),
        "dilation": lambda d: tuple(d.randrange(1, 3) for _ in range(3)),
        "exact": lambda d: d.random() < 0.7,
        "min_coverage": lambda d: d.choice([0.0, 0.5, 0.9]),
    },
    "ordered": {"order": lambda d: d.choice(["hilbert", "frame_major", "token_major", "frame_patches"])},
    "pooled_top_p": {"mass": _share, "min_density": lambda d: d.uniform(0, 0.3), "window": _window},
    "radial": {"decay": _share, "near": lambda d: d.randrange(1, 3), "first_frame": lambda d: d.random() < 0.5},
    "rectified": {"drop": _share, "mass": _share, "neighbours": lambda d: d.randrange(3)},
    "reuse": {"drift": lambda d: d.choice([0.0, 0.1, 10.0])},
    "sale": {"threshold": lambda d: d.choice([0.0001, 0.01, 0.3]), "rows": lambda d: d.randrange(1, 40)},
    "sparge": {"similarity": lambda d: d.uniform(-1, 1)},
    "sliding_tile": {"odd": lambda d: d.random() < 0.5, "inward": lambda d: d.random() < 0.5},
    "spatial_band": {"width": lambda d: d.uniform(0.1, 4), "min_coverage": lambda d: d.choice([0.3, 0.8])},
    "temporal_band": {"width": lambda d: d.uniform(0.1, 4), "min_columns": lambda d: d.choice([0.3, 0.8])},
    "stochastic_top_k": {"temperature": lambda d: d.choice([0.0, 1.0]), "seed": lambda d: d.randrange(9)},
    "svg": {"rows": lambda d: d.randrange(1, 80), "sink": lambda d: PatternSpec("first_frame_sink")},
    "svg2": {
        **dict.fromkeys(("queries", "keys", "mass", "least"), _share),
        "exact": lambda d: d.random() < 0.7,
    },
    "svg_ear": {"queries": _share, "keys": _share, "exact": lambda d: d.random() < 0.7},
    "clustered": {"queries": _share, "keys": _share},
    "xattention": {"mass": _share, "stride": lambda d: d.choice([4, 8, 16])},
    # compensations
    "coarse": {"gate": lambda d: d.uniform(0, 2)},
    "delta": {"queries": lambda d: d.randrange(1, 5), "nearest": lambda d: d.random() < 0.5},
    "merged_keys": {"parts": lambda d: d.randrange(1, 9)},
    "rectification": {"gain_aware": lambda d: d.random() < 0.5},
    "rettention": {"period": lambda d: d.randrange(1, 4), "growth": lambda d: d.uniform(0, 1)},
}


def _spec(draw: random.Random, name: str) -> PatternSpec:
    """A pattern of that name with random parameters that are valid together."""
    fields = [f for f in dataclasses.fields(pattern_class(PatternSpec(name))) if f.init]
    needed = [f for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    names = [str(f.metadata.get("parameter", f.name)) for f in needed]
    if name == "sparge":  # one of two, and neither has a default
        names.append("density")
    for _ in range(50):
        params = {key: make(draw) for key, make in _OPTIONS.get(name, {}).items() if draw.random() < 0.5}
        params |= {key: _REQUIRED[key](draw) for key in names if key not in params}
        try:
            build_pattern(PatternSpec.make(name, **params))
            return PatternSpec.make(name, **params)
        except ConfigError:  # parameters that exclude each other
            continue
    raise AssertionError(f"no parameters for pattern {name!r} were found; add them to _REQUIRED or _OPTIONS")


def _compensation(draw: random.Random) -> CompensationSpec:
    if draw.random() < 0.6:
        return CompensationSpec(draw.choice(["none", "none", "pooled_tail"]))
    name = draw.choice([name for name in compensation_names() if name not in LEFT_OUT])
    for _ in range(50):
        params = {key: make(draw) for key, make in _OPTIONS.get(name, {}).items() if draw.random() < 0.5}
        if name == "coarse":
            params.setdefault("gate", 0.5)
        try:
            build_compensation(CompensationSpec.make(name, **params))
            return CompensationSpec.make(name, **params)
        except ConfigError:
            continue
    raise AssertionError(f"no parameters for compensation {name!r} were found; add them to _OPTIONS")


def _policy(draw: random.Random) -> HeadPolicy:
    spec = _spec(draw, draw.choice([name for name in pattern_names() if name not in LEFT_OUT]))
    quantised = draw.random() < 0.3
    policy = HeadPolicy(
        spec,
        draw.choice([name for name in PRECISIONS if name != "native"]) if quantised else "native",
        "none" if spec.name == "dense" else _compensation(draw),
        draw.choice([0.0] * 7 + [0.3, 3.0, 30.0]),
    )
    try:
        check_plan(Plan.uniform("drawn", policy))
    except ConfigError:  # something that the pattern does not go with, which patch() refuses as well
        return HeadPolicy(policy.pattern)
    return policy


@dataclass(frozen=True)
class Case:
    """One random call.

    Args:
        number, seed: what it was made from.
        layout: of its tokens.
        batch, heads, dim, dtype: of q, k and v.
        storage: how they lie in memory.
        values: what they are like.
        policies: one for all heads, or one for each.
        steps: how many calls in a row, with the same memory.
    """

    seed: int
    number: int
    layout: TokenLayout
    batch: int
    heads: int
    dim: int
    dtype: str
    storage: str
    values: str
    policies: tuple[HeadPolicy, ...]
    steps: int

    def __str__(self) -> str:
        policies = " | ".join(map(str, self.policies))
        return (
            f"{self.layout}, batch {self.batch}, {self.heads} heads of {self.dim}, {self.dtype}, {self.storage},"
            f" {self.values}, {self.steps} steps: {policies}"
        )

    @cached_property
    def _base(self) -> torch.Tensor:
        return self._fill(0)

    def tensors(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v [B,S,H,D] of a step; those of later steps drift away from the first."""
        x = self._base if step == 0 else 0.9 * self._base + 0.1 * self._fill(step)
        return self._stored(x.to(_DTYPES[self.dtype]))

    def _fill(self, step: int) -> torch.Tensor:
        """float32 [3,B,S,H,D]; k and v have a mean, as real ones do."""
        draw = torch.Generator().manual_seed(hash((self.seed, self.number, step)) & 0x7FFFFFFF)
        x = torch.randn(3, self.batch, self.layout.tokens, self.heads, self.dim, generator=draw)
        x[1] += 0.7
        x[2] += 0.3
        if self.values == "peaked":
            x[:2] *= 4
        elif self.values == "even":
            x[:2] *= 0.01
        elif self.values == "outlier channel":
            x[:2, ..., 0] *= 12
        elif self.values == "constant head":
            x[:, :, :, 0] = 1.5
        elif self.values == "zeros":
            x[:] = 0
        elif self.values == "alike tokens":
            x[:] = x[:, :, :1]
        return x

    def _stored(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.storage == "heads first":
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        elif self.storage == "channels first":
            x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        elif self.storage == "slice":
            room = torch.full((3, *(extent + 2 for extent in x.shape[1:])), torch.nan, dtype=x.dtype)
            room[:, 1:-1, 1:-1, 1:-1, 1:-1] = x
            x = room[:, 1:-1, 1:-1, 1:-1, 1:-1]
        elif self.storage == "one sample for all":
            x = x[:, :1].expand(x.shape)
        if self.storage == "fused":
            q, k, v = x.permute(1, 2, 0, 3, 4).contiguous().unbind(2)
        else:
            q, k, v = x.unbind(0)
        return q, k, v


def draw_case(seed: int, number: int) -> Case:
    """The case of that number, the same in every run."""
    draw = random.Random(f"{seed}-{number}")
    frames, height = draw.randrange(1, 8), draw.randrange(1, 9)
    grid = VideoGrid(frames, height, draw.randrange(1, max(2, min(11, 260 // (frames * height)))))
    tile = TileShape(draw.randrange(1, 4), draw.randrange(1, 6), draw.randrange(1, 6))
    layout = TokenLayout.of(
        grid,
        None if draw.random() < 0.1 else tile,
        text_tokens=draw.choice([0, 0, 0, 1, 7, 40]),
        text_first=draw.random() < 0.5,
    )
    heads = draw.choice([1, 2, 3, 4])
    return Case(
        seed=seed,
        number=number,
        layout=layout,
        batch=draw.choice([1, 1, 2]),
        heads=heads,
        dim=draw.choice([2, 8, 16, 24, 44, 64]),
        dtype=draw.choice(["float32", "float32", "bfloat16", "float16"]),
        storage=draw.choice(_STORAGE),
        values=draw.choice(_VALUES),
        policies=tuple(_policy(draw) for _ in range(heads)) if draw.random() < 0.2 else (_policy(draw),),
        steps=draw.choice([1, 1, 1, 2, 3]),
    )
