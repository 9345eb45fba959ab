"""The Mochi pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.tiny_wan import tiny_text
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 13  # latents 3x6x10, token grid 3x3x5


def _pipe() -> Any:
    tokenizer, encoder = tiny_text()
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=3,  # the last one gives no text, so two that do
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    return diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def _call() -> dict[str, Any]:
    return {
        "prompt": "a red ball",
        "negative_prompt": "a cat",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }


def _two() -> dict[str, Any]:
    return {"prompt": ["a red ball", "a green square moving left"], "negative_prompt": ["a cat", "a cat"]}


CASES = (Case("MochiPipeline", _pipe, _call, _two),)
