"""HunyuanVideo 1.5: two streams throughout, text behind the video, valid tokens before padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..types import VideoGrid
from .base import REFINER, Family, TokenOrder, grid_of

__all__ = ["HunyuanVideo15Family"]


class HunyuanVideo15Family(Family):
    """HunyuanVideo 1.5 T2V and I2V.

    The original processor builds a [B, 1, S, S] mask in every layer, 10 GB for a 720p video. It only says which of the
    last tokens are padding, so ours takes the text mask as it is.
    """

    name = "hunyuan-video-1.5"
    transformers = ("HunyuanVideo15Transformer3DModel",)
    pipelines = ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
    layers = ("transformer_blocks.*.attn",)
    processors = ("HunyuanVideo15AttnProcessor2_0",)
    forget = frozenset({"attention_mask", "self_attn_mask_1", "self_attn_mask_2"})
    token_order = "video, then image, glyph and text tokens, then padding"
    joint = True
    dense = (("context_embedder.token_refiner", REFINER),)
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
