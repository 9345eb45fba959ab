"""Mochi: two streams, valid text behind the video, one attention call for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..types import VideoGrid
from .base import Family, grid_of

__all__ = ["MochiFamily"]


class MochiFamily(Family):
    """Mochi 1. Its processor cuts the padding off and attends sample by sample, so a step counts a call for each."""

    name = "mochi"
    transformers = ("MochiTransformer3DModel",)
    pipelines = ("MochiPipeline",)
    layers = ("transformer_blocks.*.attn1",)
    processors = ("MochiAttnProcessor2_0",)
    token_order = "video, then valid text"
    joint = True
    separate_guidance = False
    fps = 30.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"], (1, model.config.patch_size, model.config.patch_size))

    def timestep(self, call: Mapping[str, Any], scheduler: Any) -> torch.Tensor | float:
        timestep: torch.Tensor = call["timestep"]  # counts towards the clean video
        inverted = getattr(getattr(scheduler, "config", None), "invert_sigmas", False)  # as Mochi's own scheduler does
        return timestep if inverted else 1000 - timestep
