"""HunyuanVideo: two streams, then one, with text behind the video in self-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..types import VideoGrid
from .base import REFINER, Family, TokenOrder, grid_of

__all__ = ["FramepackFamily", "HunyuanVideoFamily"]


class HunyuanVideoFamily(Family):
    """HunyuanVideo T2V and I2V, SkyReels-V1."""

    name = "hunyuan-video"
    transformers = ("HunyuanVideoTransformer3DModel",)
    pipelines = (
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    )
    layers = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    processors = ("HunyuanVideoAttnProcessor2_0",)
    token_order = "video, then text"
    joint = True
    dense = (("context_embedder.token_refiner", REFINER),)
    separate_guidance = True
    fps = 24.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        config = model.config
        return grid_of(call["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))

    def tiles_once(self, model: Any, call: Mapping[str, Any]) -> bool:
        # token replacement modulates the first frame's tokens, found by their place in raster order
        return bool(model.config.image_condition_type != "token_replace")

    def order_hooks(self, model: Any, order: TokenOrder) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield model.x_embedder.register_forward_hook(order.tile_tokens)
        yield model.rope.register_forward_hook(order.tile_tables)
        yield model.norm_out.register_forward_pre_hook(order.untile_tokens)


class FramepackFamily(Family):
    """Framepack: compressed history frames before the video, image and text tokens behind it."""

    name = "hunyuan-video-framepack"
    transformers = ("HunyuanVideoFramepackTransformer3DModel",)
    pipelines = ("HunyuanVideoFramepackPipeline",)
    layers = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    processors = ("HunyuanVideoAttnProcessor2_0",)
    token_order = "history, video, then image and text"
    joint = True
    dense = (("context_embedder.token_refiner", REFINER),)
    separate_guidance = True
    fps = 30.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        config = model.config
        return grid_of(call["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))

    def before(self, model: Any, call: Mapping[str, Any]) -> int | None:
        tokens = 0
        # the kernels of HunyuanVideoHistoryPatchEmbed, of which those of old history pad their input
        for name, kernel in (
            ("latents_clean", (1, 2, 2)),
            ("latents_history_2x", (2, 4, 4)),
            ("latents_history_4x", (4, 8, 8)),
        ):
            latents = call.get(name)
            if latents is not None and call.get(f"indices_{name}") is not None:
                pad = 0 if name == "latents_clean" else 1
                t, h, w = ((size + pad * (k - 1)) // k for size, k in zip(latents.shape[2:], kernel, strict=True))
                tokens += t * h * w
        return tokens
