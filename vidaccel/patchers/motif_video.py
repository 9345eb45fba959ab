"""Motif-Video: two streams, then one, then decoder layers that see the encoder's video tokens beside their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..types import VideoGrid
from .base import PROMPT, Family, TokenOrder, grid_of

__all__ = ["MotifVideoFamily"]


class MotifVideoFamily(Family):
    """Motif-Video T2V and I2V. In its decoder layers the encoder's video tokens are other tokens: always attended."""

    name = "motif-video"
    transformers = ("MotifVideoTransformer3DModel",)
    pipelines = ("MotifVideoPipeline", "MotifVideoImage2VideoPipeline")
    layers = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    processors = ("MotifVideoAttnProcessor2_0",)
    token_order = "video, then image and text; in decoder layers the video twice"
    joint = True
    dense = (("*.cross_attn", PROMPT),)
    separate_guidance = True
    fps = 24.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        config = model.config
        return grid_of(call["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))

    def tiles_once(self, model: Any, call: Mapping[str, Any]) -> bool:
        return True

    def order_hooks(self, model: Any, order: TokenOrder) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield model.x_embedder.register_forward_hook(order.tile_tokens)
        yield model.rope.register_forward_hook(order.tile_tables)
        yield model.norm_out.register_forward_pre_hook(order.untile_tokens)
