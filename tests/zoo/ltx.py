"""The LTX-Video pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.tiny_wan import tiny_text
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 96, 160, 17  # token grid 3x3x5
#: Both long enough for a negative prompt, different in valid length.
PROMPTS = {"prompt": ["a red ball", "a green square moving left"], "negative_prompt": ["a cat", "a cat"]}


def _vae() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def _pipe(cls: str, scheduler: str = "FlowMatchEulerDiscreteScheduler") -> Any:
    tokenizer, encoder = tiny_text()
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=32,
    ).eval()
    return getattr(diffusers, cls)(
        scheduler=getattr(diffusers, scheduler)(),
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _case(
    pipeline: str,
    extra: Callable[[], dict[str, Any]] = dict,
    two: Callable[[], dict[str, Any]] | None = lambda: PROMPTS,
    **more: Any,
) -> Case:
    def call() -> dict[str, Any]:
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
            **extra(),
        }

    build = more.pop("build", lambda: _pipe(pipeline))
    return Case(pipeline, build, call, two, **more)


CASES = (
    _case("LTXPipeline"),
    _case("LTXImageToVideoPipeline", lambda: {"image": _image()}, lambda: {"image": [_image()] * 2, **PROMPTS}),
    _case("LTXConditionPipeline", lambda: {"image": _image()}, None, sparse=False, reason="coordinates of tokens"),
    _case(
        "LTXI2VLongMultiPromptPipeline",
        lambda: {"cond_image": _image(), "num_inference_steps": 3},
        None,
        build=lambda: _pipe("LTXI2VLongMultiPromptPipeline", "LTXEulerAncestralRFScheduler"),
        sparse=False,
        reason="a 1x1x1 grid",  # the pipeline gives coordinates, and 1 for each size
    ),
)
