"""Wan and its relatives: one stream of video tokens in self-attention, text only in cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..types import VideoGrid
from .base import PROMPT, Family, TokenOrder, grid_of

__all__ = ["WanAnimateFamily", "WanFamily"]


class WanFamily(Family):
    """Wan 2.1/2.2 (T2V, I2V, V2V), VACE, Lucy, SkyReels-V2, ChronoEdit."""

    name = "wan"
    transformers = (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    )
    pipelines = (
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanVACEPipeline",
        "LucyEditPipeline",
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "ChronoEditPipeline",
    )
    # VACE's control blocks are numbered after the main ones
    layers = ("blocks.*.attn1", "vace_blocks.*.attn1")
    processors = ("WanAttnProcessor", "SkyReelsV2AttnProcessor")
    dense = (
        ("blocks.*.attn2", PROMPT),
        ("vace_blocks.*.attn2", PROMPT),
    )
    separate_guidance = True
    fps = 16.0
    fps_of: ClassVar[Mapping[str, float]] = {
        "LucyEditPipeline": 24.0,
        "SkyReelsV2Pipeline": 24.0,
        "SkyReelsV2ImageToVideoPipeline": 24.0,
        "SkyReelsV2DiffusionForcingPipeline": 24.0,
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": 24.0,
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": 24.0,
    }
    needs: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "WanVideoToVideoPipeline": (("video",),),
    }

    def frame_rate(self, pipe: Any) -> float | None:
        # Wan 2.2's 5B model is the one with a timestep for each token, and makes 24 frames a second
        config = getattr(pipe, "config", None)
        return 24.0 if getattr(config, "expand_timesteps", False) else super().frame_rate(pipe)

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"], model.config.patch_size)

    def tiles_once(self, model: Any, call: Mapping[str, Any]) -> bool:
        if call.get("enable_diffusion_forcing"):  # per-token modulation is built inside forward, out of a hook's reach
            return False
        if getattr(model.config, "num_frame_per_block", 1) > 1:  # so is a token mask
            return False
        control = call.get("control_hidden_states")
        # a shorter control is zero-padded after the patch embedding, in raster order
        return control is None or control.shape[2:] == call["hidden_states"].shape[2:]

    def order_hooks(self, model: Any, order: TokenOrder) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield model.patch_embedding.register_forward_hook(order.tile_volume)
        if hasattr(model, "vace_patch_embedding"):
            yield model.vace_patch_embedding.register_forward_hook(order.tile_volume)
        yield model.rope.register_forward_hook(order.tile_tables)
        yield model.condition_embedder.register_forward_hook(_TokenTimesteps(order))
        yield model.norm_out.register_forward_pre_hook(order.untile_tokens)


class _TokenTimesteps:
    """Forward hook of the condition embedder: Wan2.2-5B has one timestep per token, so its modulation is per token.

    The first output, temb, stays in raster order: it is used after the final norm's pre-hook has put tokens back.
    """

    def __init__(self, order: TokenOrder) -> None:
        self._order = order

    def __call__(self, module: nn.Module, args: Any, out: tuple[Any, ...]) -> Any:
        temb, timestep_proj, *rest = out
        if timestep_proj.dim() != 3:
            return None
        tiled = self._order.tile_tables(module, args, (timestep_proj,))
        return None if tiled is None else (temb, tiled[0], *rest)


class WanAnimateFamily(Family):
    """Wan-Animate: the reference image's tokens precede the video and stay dense; motion goes to face adapters."""

    name = "wan-animate"
    transformers = ("WanAnimateTransformer3DModel",)
    pipelines = ("WanAnimatePipeline",)
    layers = ("blocks.*.attn1",)
    processors = ("WanAttnProcessor",)
    token_order = "reference frame, then video"
    joint = True
    dense = (
        ("blocks.*.attn2", PROMPT),
        ("face_adapter", "cross-attention to the face within each frame"),
    )
    separate_guidance = True
    fps = 30.0

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return grid_of(call["hidden_states"][:, :, 1:], model.config.patch_size)

    def before(self, model: Any, call: Mapping[str, Any]) -> int | None:
        return None
