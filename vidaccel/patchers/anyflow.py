"""AnyFlow: Wan's blocks with frames before channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import VideoGrid
from .base import PROMPT, Family, grid_of

__all__ = ["AnyFlowFamily"]


class AnyFlowFamily(Family):
    """AnyFlow, bidirectional."""

    name = "anyflow"
    transformers = ("AnyFlowTransformer3DModel",)
    pipelines = ("AnyFlowPipeline",)
    layers = ("blocks.*.attn1",)
    processors = ("AnyFlowAttnProcessor",)
    dense = (("blocks.*.attn2", PROMPT),)
    separate_guidance = False
    fps = 16.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"].transpose(1, 2), model.config.patch_size)  # [B, T, C, H, W]
