"""Wan and its relatives: one stream of video tokens in self-attention, text only in cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..engine.ops import attention
from ..types import VideoGrid
from .base import Family, SparseProcessor, TokenOrder

__all__ = ["WanFamily"]


class WanSparseProcessor(SparseProcessor):
    """WanAttnProcessor's self-attention with the attention call replaced by our operator."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:  # cross-attention was routed here: not ours to change
            out: torch.Tensor = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return out
        # call the projections, never read their weights: LoRA and quantisation replace these modules
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        out = attention(q, k, v, self.handle, attention_mask)
        out = attn.to_out[0](out.flatten(2, 3).type_as(q))
        return attn.to_out[1](out)  # type: ignore[no-any-return]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved RoPE on [B, S, H, D] with tables [1, S, 1, D], rounded to x's dtype once per element."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


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
    processors = ("WanAttnProcessor", "SkyReelsV2AttnProcessor")
    token_order = "video only"
    stays_dense = "attn2: cross-attention to text and image tokens"
    separate_guidance = True

    def attention_layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        # VACE's control blocks are numbered after the main ones
        for stack in ("blocks", "vace_blocks"):
            for index, block in enumerate(getattr(model, stack, ())):
                yield f"{stack}.{index}.attn1", block.attn1

    def left_alone(self, model: Any) -> Iterator[dict[str, str]]:
        for stack in ("blocks", "vace_blocks"):
            if len(getattr(model, stack, ())):
                yield {"module": f"{stack}.*.attn2", "reason": "cross-attention to the prompt, dense by design"}

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        latents = call["hidden_states"]
        if latents.dim() != 5:
            return f"hidden_states has {latents.dim()} axes instead of [B, C, T, H, W]"
        extents = (size // patch for size, patch in zip(latents.shape[2:], model.config.patch_size, strict=True))
        return VideoGrid(*extents)

    def tiles_once(self, model: Any, call: Mapping[str, Any]) -> bool:
        if call.get("enable_diffusion_forcing"):  # per-token modulation is built inside forward, out of a hook's reach
            return False
        if getattr(model.config, "num_frame_per_block", 1) > 1:  # so is a token mask
            return False
        control = call.get("control_hidden_states")
        # a shorter control is zero-padded after the patch embedding, in raster order
        return control is None or control.shape[2:] == call["hidden_states"].shape[2:]

    def processor(self, original: Any) -> SparseProcessor:
        return WanSparseProcessor(original)

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
