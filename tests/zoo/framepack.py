"""The Framepack pipeline, in both of its orders."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.zoo.case import Case
from tests.zoo.hunyuan_video import FRAMES, HEIGHT, TRANSFORMER, WIDTH, embeds, image, tiny_vae


def _pipe() -> Any:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **TRANSFORMER, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True
    )
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return diffusers.HunyuanVideoFramepackPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        vae=tiny_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        image_encoder=SiglipVisionModel(config).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )


def _call(sampling: str) -> dict[str, Any]:
    return {
        **embeds(5),
        "image": image(),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": 2 * FRAMES,  # two sections
        "latent_window_size": 3,
        "num_inference_steps": 2,
        "true_cfg_scale": 3.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
        "sampling_type": sampling,
    }


def _sections(out: Any) -> torch.Tensor:
    """The latents after the last section, which hold those of all."""
    latents = out[0][-1]
    assert isinstance(latents, torch.Tensor)
    return latents


def _two() -> dict[str, Any]:
    return {**embeds(5, 8), "image": [image()] * 2}


CASES = (
    Case("HunyuanVideoFramepackPipeline", _pipe, lambda: _call("inverted_anti_drifting"), _two, output=_sections),
    Case("HunyuanVideoFramepackPipeline-F1", _pipe, lambda: _call("vanilla"), _two, output=_sections),
)
