"""The HunyuanVideo pipelines, and SkyReels-V1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.zoo.case import Case

__all__ = ["CASES", "embeds", "image", "tiny_vae"]

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5
TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def tiny_vae() -> Any:
    """A random HunyuanVideo VAE: 8x8 pixels and 4 frames to a latent, 4 channels."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ).eval()


def embeds(*lengths: int) -> dict[str, Any]:
    """A prompt of each length, padded to 8, and a negative one of 4: the text encoders are Llama and CLIP."""
    generator = torch.Generator().manual_seed(3)
    prompts = len(lengths)
    return {
        "prompt_embeds": torch.randn(prompts, 8, 16, generator=generator),
        "pooled_prompt_embeds": torch.randn(prompts, 8, generator=generator),
        "prompt_attention_mask": (torch.arange(8) < torch.tensor(lengths)[:, None]).long(),
        "negative_prompt_embeds": torch.randn(prompts, 8, 16, generator=generator),
        "negative_pooled_prompt_embeds": torch.randn(prompts, 8, generator=generator),
        "negative_prompt_attention_mask": (torch.arange(8) < 4).long().expand(prompts, 8),
    }


def image() -> Image.Image:
    """Noise, as large as the video."""
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _pipe(cls: str, config: dict[str, Any]) -> Any:
    more = {"image_processor": None} if cls == "HunyuanVideoImageToVideoPipeline" else {}
    return getattr(diffusers, cls)(
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **config}).eval(),
        vae=tiny_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        **more,
    )


def _case(name: str, extra: Callable[[int], dict[str, Any]] = lambda prompts: {}, **config: Any) -> Case:
    """A pipeline that needs ``extra(number of prompts)`` beside the common arguments."""

    def call() -> dict[str, Any]:
        return {
            **embeds(5),
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "num_inference_steps": 2,
            "true_cfg_scale": 3.0,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            **extra(1),
        }

    return Case(name, lambda: _pipe(name.split("-")[0], config), call, lambda: {**embeds(5, 8), **extra(2)})


def _images(prompts: int) -> dict[str, Any]:
    return {"image": [image()] * prompts}


CASES = (
    _case("HunyuanVideoPipeline"),
    _case(
        "HunyuanVideoImageToVideoPipeline-latent_concat",
        _images,
        in_channels=9,
        image_condition_type="latent_concat",
        guidance_embeds=False,
    ),
    _case("HunyuanVideoImageToVideoPipeline-token_replace", _images, image_condition_type="token_replace"),
    _case("HunyuanSkyreelsImageToVideoPipeline", _images, in_channels=8),
)
