"""CogVideoX and ConsisID: one stream with text before the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..types import VideoGrid
from .base import Family, grid_of

__all__ = ["CogVideoXFamily"]


class CogVideoXFamily(Family):
    """CogVideoX T2V, I2V, V2V and Fun-Control; ConsisID."""

    name = "cogvideox"
    transformers = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    pipelines = (
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
        "ConsisIDPipeline",
    )
    layers = ("transformer_blocks.*.attn1",)
    processors = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
    token_order = "text, then video"
    joint = True
    dense = (("perceiver_cross_attention", "ConsisID's cross-attention to the face"),)
    separate_guidance = False
    fps = 8.0
    needs: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "CogVideoXVideoToVideoPipeline": (("video",),),
        "CogVideoXFunControlPipeline": (("control_video", "control_video_latents"),),
        "ConsisIDPipeline": (("id_vit_hidden",), ("id_cond",)),
    }

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        patch, patch_t = model.config.patch_size, getattr(model.config, "patch_size_t", None) or 1
        return grid_of(call["hidden_states"].transpose(1, 2), (patch_t, patch, patch))  # [B, T, C, H, W]

    def before(self, model: Any, call: Mapping[str, Any]) -> int | None:
        return None
