"""Plans of the reliability tests, and what they give with nothing else going on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import vidaccel
from tests.zoo.case import Case
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape

__all__ = ["REMEMBERS", "SPARSE", "alone", "dense", "distance", "patched"]

#: A tiny window in every layer and step: far from dense, and from any shuffling of tokens.
SPARSE = Plan(
    "sparse", (Rule(LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),))),),
    tile=TileShape(2, 2, 2),
)  # fmt: skip

#: What sparse attention misses is measured in the first step of a run and added in the others.
REMEMBERS = Plan(
    "remembers",
    (Rule(LayerPolicy((HeadPolicy(PatternSpec.make("pooled_top_k", density=0.3), compensation="rettention"),))),),
    tile=TileShape(1, 3, 3),
)


@cache
def dense(case: Case) -> torch.Tensor:
    """What the unpatched pipeline gives."""
    return case.run(case.make())


@cache
def alone(case: Case, plan: Plan = SPARSE) -> torch.Tensor:
    """What a pipeline gives that is patched and runs once."""
    pipe = case.make()
    vidaccel.patch(pipe, plan, strict=True)
    return case.run(pipe)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def patched(case: Case, plan: Plan = SPARSE, **options: Any) -> tuple[Any, vidaccel.Session]:
    """A new pipeline and its session."""
    pipe = case.make()
    return pipe, vidaccel.patch(pipe, plan, **options)
