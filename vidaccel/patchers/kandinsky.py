"""Kandinsky 5 and 6: one stream of video tokens with channels last; the audio of Kandinsky 6 is not touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import VideoGrid
from .base import AUDIO, PROMPT, REFINER, Family, grid_of

__all__ = ["Kandinsky5Family", "Kandinsky6Family"]


class Kandinsky5Family(Family):
    """Kandinsky 5 T2V and I2V. Dense where a checkpoint runs its own sparse attention (NABLA)."""

    name = "kandinsky5"
    transformers = ("Kandinsky5Transformer3DModel",)
    pipelines = ("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline")
    layers = ("visual_transformer_blocks.*.self_attention",)
    processors = ("Kandinsky5AttnProcessor",)
    dense = (
        ("visual_transformer_blocks.*.cross_attention", PROMPT),
        ("text_transformer_blocks.*", REFINER),
    )
    separate_guidance = True
    fps = 24.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        if call.get("sparse_params") is not None:
            return "the model runs its own sparse attention (NABLA)"
        return grid_of(call["hidden_states"].movedim(-1, 1), model.patch_size)  # [B, T, H, W, C]


class Kandinsky6Family(Family):
    """Kandinsky 6 TI2VA. A reference frame behind the video counts as one of its frames."""

    name = "kandinsky6"
    transformers = ("Kandinsky6Transformer3DModel",)
    pipelines = ("Kandinsky6TI2VAPipeline",)
    layers = ("visual_transformer_blocks.*.video_dec_block.self_attention",)
    processors = ("Kandinsky6AttnProcessor",)
    token_order = "video only; audio apart"
    dense = (
        ("visual_transformer_blocks.*.cross_attention", PROMPT),
        ("visual_transformer_blocks.*.audio_dec_block", AUDIO),
        ("visual_transformer_blocks.*_cross_attention", "audio and video attend each other"),
        ("video_text_transformer_blocks.*, audio_text_transformer_blocks.*", REFINER),
    )
    separate_guidance = True
    fps = 24.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"].movedim(-1, 1), model.patch_size)  # [B, T, H, W, C]
