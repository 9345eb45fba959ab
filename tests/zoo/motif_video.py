"""The Motif-Video pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.tiny_wan import tiny_vae
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5


class _Vision(nn.Module):
    """The part of the text encoder that sees the image; prompts come as embeddings."""

    def __init__(self) -> None:
        super().__init__()
        config = SiglipVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
        self.vision_tower = SiglipVisionModel(config)

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype


def _pipe(cls: str) -> Any:
    still = cls == "MotifVideoImage2VideoPipeline"
    transformer = diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        text_embed_dim=16,
        image_embed_dim=8 if still else None,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return getattr(diffusers, cls)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=tiny_vae(),
        text_encoder=_Vision().eval() if still else None,
        tokenizer=None,
        transformer=transformer.eval(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}) if still else None,
    )


def _embeds(*lengths: int) -> dict[str, Any]:
    """A prompt of each length, padded to 8, and a negative one of 4: the text encoder is T5Gemma 2."""
    generator = torch.Generator().manual_seed(3)
    prompts = len(lengths)
    return {
        "prompt_embeds": torch.randn(prompts, 8, 16, generator=generator),
        "prompt_attention_mask": torch.arange(8) < torch.tensor(lengths)[:, None],
        "negative_prompt_embeds": torch.randn(prompts, 8, 16, generator=generator),
        "negative_prompt_attention_mask": (torch.arange(8) < 4).expand(prompts, 8),
    }


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _case(pipeline: str, extra: Callable[[], dict[str, Any]] = dict, *, two: bool = True) -> Case:
    def call() -> dict[str, Any]:
        return {
            **_embeds(5),
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            **extra(),
        }

    return Case(pipeline, lambda: _pipe(pipeline), call, (lambda: _embeds(5, 8)) if two else None)


CASES = (
    _case("MotifVideoPipeline"),
    _case("MotifVideoImage2VideoPipeline", lambda: {"prompt": None, "image": _image()}, two=False),
)
