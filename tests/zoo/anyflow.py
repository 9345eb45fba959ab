"""The AnyFlow pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.tiny_wan import tiny_text, tiny_vae
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5


def _pipe() -> Any:
    tokenizer, encoder = tiny_text()
    transformer = diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.AnyFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=transformer.eval(),
        vae=tiny_vae(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
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


CASES = (Case("AnyFlowPipeline", _pipe, _call, _two),)
