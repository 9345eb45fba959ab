"""The Allegro pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.tiny_wan import tiny_text
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 12  # latents 3x6x10, token grid 3x3x5


def _pipe(head_dim: int = 24) -> Any:
    tokenizer, encoder = tiny_text()
    vae = diffusers.AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=head_dim,
        num_layers=2,
        cross_attention_dim=3 * head_dim,
        caption_channels=32,
        sample_height=6,
        sample_width=10,
        sample_frames=3,
    )
    return diffusers.AllegroPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(beta_end=0.002),
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
        "clean_caption": False,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }


def _two() -> dict[str, Any]:
    return {"prompt": ["a red ball", "a green square moving left on a cat"]}


CASES = (
    Case("AllegroPipeline", _pipe, _call, _two),
    Case("AllegroPipeline-96", lambda: _pipe(96), _call, _two),  # the published model's head dimension
)
