"""Helios: one stream with compressed history frames before the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import VideoGrid
from .base import PROMPT, Family, grid_of

__all__ = ["HeliosFamily"]


class HeliosFamily(Family):
    """Helios and Helios-Pyramid. History tokens stay dense; their amplified keys come to us amplified."""

    name = "helios"
    transformers = ("HeliosTransformer3DModel",)
    pipelines = ("HeliosPipeline", "HeliosPyramidPipeline")
    layers = ("blocks.*.attn1",)
    processors = ("HeliosAttnProcessor",)
    token_order = "history, then video"
    joint = True
    dense = (("blocks.*.attn2", PROMPT),)
    separate_guidance = True
    fps = 24.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"], model.config.patch_size)

    def before(self, model: Any, call: Mapping[str, Any]) -> int | None:
        return None
