"""The HunyuanVideo 1.5 pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents and token grid 3x3x5


def _vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    ).eval()


def _pipe(cls: str) -> Any:
    still = cls == "HunyuanVideo15ImageToVideoPipeline"
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        target_size=64,  # 48x80 is one of the sizes with about 64x64 pixels
        task_type="i2v" if still else "t2v",
    )
    return getattr(diffusers, cls)(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        vae=_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        **(_siglip() if still else {}),
    )


def _siglip() -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return {
        "image_encoder": SiglipVisionModel(config).eval(),
        "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32}),
    }


def _embeds(*lengths: int) -> dict[str, Any]:
    """A prompt of each length, padded to 8, glyphs of 3, none, 3, ..., padded to 6; negative ones of 4 without.

    The text encoders are Qwen2.5-VL and ByT5.
    """
    generator = torch.Generator().manual_seed(3)
    prompts = len(lengths)
    glyphs = torch.tensor([3 * (1 - i % 2) for i in range(prompts)])
    found: dict[str, Any] = {}
    for prefix, words, letters in (
        ("", torch.tensor(lengths), glyphs),
        ("negative_", torch.tensor([4] * prompts), torch.zeros(prompts)),
    ):
        found[f"{prefix}prompt_embeds"] = torch.randn(prompts, 8, 16, generator=generator)
        found[f"{prefix}prompt_embeds_mask"] = (torch.arange(8) < words[:, None]).long()
        found[f"{prefix}prompt_embeds_2"] = torch.randn(prompts, 6, 12, generator=generator)
        found[f"{prefix}prompt_embeds_mask_2"] = (torch.arange(6) < letters[:, None]).long()
    return found


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _case(pipeline: str, extra: Callable[[], dict[str, Any]]) -> Case:
    def call() -> dict[str, Any]:
        return {
            **_embeds(5),
            "num_frames": FRAMES,
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            **extra(),
        }

    return Case(pipeline, lambda: _pipe(pipeline), call, lambda: _embeds(5, 8))


CASES = (
    _case("HunyuanVideo15Pipeline", lambda: {"height": HEIGHT, "width": WIDTH}),
    _case("HunyuanVideo15ImageToVideoPipeline", lambda: {"image": _image()}),
)
