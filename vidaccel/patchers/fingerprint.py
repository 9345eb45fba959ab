"""What a plan must match, read off a live transformer and its scheduler."""

from __future__ import annotations

from typing import Any

from ..configs.fingerprint import Fingerprint
from ..types import VideoGrid
from ..version import __version__
from .base import Family

__all__ = ["fingerprint_of"]

#: Configuration entries that change what attention sees. Others, such as dtype or paths, may differ freely.
_KEYS = ("attention_head_dim", "ffn_dim", "in_channels", "num_layers", "patch_size", "qk_norm", "vace_layers")


def fingerprint_of(
    family: Family, model: Any, scheduler: object | None = None, grid: VideoGrid | None = None
) -> Fingerprint:
    """The fingerprint of ``model`` as it stands; ``grid`` is known only once a video's size is."""
    config = getattr(model, "config", {})
    layers = list(family.attention_layers(model))
    return Fingerprint.make(
        {key: config[key] for key in _KEYS if key in config},
        model_class=type(model).__name__,
        heads=family.heads_of(layers[0][1]),
        layers=len(layers),
        grid=grid,
        scheduler=None if scheduler is None else type(scheduler).__name__,
        vidaccel=__version__,
    )
