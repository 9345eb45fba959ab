"""Allegro: one stream of video tokens with 96 channels a head, text in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import VideoGrid
from .base import PROMPT, Family, grid_of

__all__ = ["AllegroFamily"]


class AllegroFamily(Family):
    """Allegro T2V."""

    name = "allegro"
    transformers = ("AllegroTransformer3DModel",)
    pipelines = ("AllegroPipeline",)
    layers = ("transformer_blocks.*.attn1",)
    processors = ("AllegroAttnProcessor2_0",)
    dense = (("transformer_blocks.*.attn2", PROMPT),)
    separate_guidance = False
    fps = 15.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        config = model.config
        return grid_of(call["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))
