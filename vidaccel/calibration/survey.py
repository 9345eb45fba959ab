"""One dense generation, looked at from outside: what there is to calibrate, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..configs.plan import Plan
from ..engine.session import Session
from ..engine.site import Observer
from ..errors import ConfigError
from ..layout import TokenLayout
from ..pipelines.generate import Generation, Request, accepted_arguments, generate
from ..pipelines.patch import patch
from ..types import TileShape
from .observe import LevelWatcher

__all__ = ["Survey", "take_survey", "watching"]


@dataclass(frozen=True, eq=False)
class Survey:
    """What one dense generation shows.

    Args:
        levels, owners: noise level and transformer by step.
        layout: order and blocks of the tokens of a layer.
        batch, heads, head_dim: of q.
        dtype: of q.
        total, attention: seconds of the generation, and of self-attention in it.
        generation: what came out.
    """

    levels: dict[int, float]
    owners: dict[int, str]
    layout: TokenLayout
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    total: float
    attention: float
    generation: Generation


def take_survey(pipe: Any, request: Request, tile: TileShape | None) -> Survey:
    """Runs ``request`` dense, after a short run that does the first-time work which no generation costs.

    Args:
        tile: of the blocks, or ``None`` for the layout's choice.

    Raises:
        ConfigError: if no attention layer can be calibrated.
    """
    watcher = LevelWatcher()
    with watching(pipe, watcher, tile):
        generate(pipe, _short(pipe, request))
    session = patch(pipe, Plan.dense())
    try:
        session.observer = levels = LevelWatcher(layout=watcher.layout)
        generation = generate(pipe, request)
        report = session.report()
    finally:
        session.close()
    if watcher.layout is None:
        reasons = "; ".join(report.fallbacks) or "no attention layer was called"
        raise ConfigError(f"nothing can be calibrated: {reasons}")
    batch, _, heads, head_dim = watcher.shape
    assert watcher.dtype is not None
    return Survey(
        levels.levels, levels.owners, watcher.layout, batch, heads, head_dim, watcher.dtype,
        generation.seconds["total"], report.attention_seconds, generation,
    )  # fmt: skip


@contextmanager
def watching(pipe: Any, watcher: Observer, tile: TileShape | None) -> Iterator[Session]:
    """While the block runs, the pipeline is dense and shows its attention calls to ``watcher``."""
    session = patch(pipe, Plan.dense())
    try:
        session.observer, session.observed_tile = watcher, tile
        yield session
    finally:
        session.close()


def _short(pipe: Any, request: Request) -> Request:
    """The same with two steps, where the pipeline has steps."""
    if "num_inference_steps" not in accepted_arguments(pipe) or {"timesteps", "sigmas"} & set(request.arguments):
        return request
    return replace(request, arguments={**request.arguments, "num_inference_steps": 2})
