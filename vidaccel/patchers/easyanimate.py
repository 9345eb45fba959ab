"""EasyAnimate: two streams or one, with text before the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import VideoGrid
from .base import Family, grid_of

__all__ = ["EasyAnimateFamily"]


class EasyAnimateFamily(Family):
    """EasyAnimate 5.1: T2V, inpainting and I2V, control."""

    name = "easyanimate"
    transformers = ("EasyAnimateTransformer3DModel",)
    pipelines = ("EasyAnimatePipeline", "EasyAnimateInpaintPipeline", "EasyAnimateControlPipeline")
    layers = ("transformer_blocks.*.attn1",)
    processors = ("EasyAnimateAttnProcessor2_0",)
    token_order = "text, then video"
    joint = True
    separate_guidance = False
    fps = 8.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"], (1, model.config.patch_size, model.config.patch_size))

    def before(self, model: Any, call: Mapping[str, Any]) -> int | None:
        return None
