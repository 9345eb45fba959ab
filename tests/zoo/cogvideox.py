"""The CogVideoX pipelines and ConsisID."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.tiny_wan import tiny_text
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5
PROMPTS = {"prompt": ["a red ball", "a green square moving left"], "negative_prompt": ["a cat", "a cat"]}
TRANSFORMER = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 10,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": 16,
}
ROPE = {"use_rotary_positional_embeddings": True}
FACE = {
    "is_train_face": True,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 6,
    "LFE_vit_dim": 8,
    "LFE_depth": 5,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 2,
    "LFE_num_querie": 3,
    "LFE_output_dim": 32,  # two thirds of the width, as the cross-attention expects
}


def _vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=HEIGHT,
        sample_width=WIDTH,
    ).eval()


def _pipe(cls: str, config: dict[str, Any]) -> Any:
    tokenizer, encoder = tiny_text()
    model = "ConsisIDTransformer3DModel" if cls == "ConsisIDPipeline" else "CogVideoXTransformer3DModel"
    scheduler = "CogVideoXDPMScheduler" if cls == "ConsisIDPipeline" else "CogVideoXDDIMScheduler"
    return getattr(diffusers, cls)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(),
        transformer=getattr(diffusers, model)(**{**TRANSFORMER, **config}).eval(),
        scheduler=getattr(diffusers, scheduler)(),
    )


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _face() -> dict[str, Any]:
    """Features of a face, as the face encoder gives them."""
    generator = torch.Generator().manual_seed(3)
    return {
        "image": _image(),
        "id_vit_hidden": [torch.randn(1, 2, 8, generator=generator) for _ in range(5)],
        "id_cond": torch.randn(1, 6, generator=generator),
    }


def _case(
    name: str,
    config: dict[str, Any],
    extra: Callable[[], dict[str, Any]] = dict,
    two: Callable[[], dict[str, Any]] = dict,
) -> Case:
    """A pipeline that needs ``extra`` arguments beside the common ones, and ``two`` instead for two prompts.

    ``...`` takes one of the common ones out.
    """

    def call() -> dict[str, Any]:
        arguments = {
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
        return {key: value for key, value in arguments.items() if value is not ...}

    return Case(name, lambda: _pipe(name.split("-")[0], config), call, lambda: {**PROMPTS, **two()})


CASES = (
    _case("CogVideoXPipeline-2b", {}),
    _case("CogVideoXPipeline-5b", ROPE),
    # pads 5 latent frames to 6, 2 to a token
    _case("CogVideoXPipeline-1.5", {**ROPE, "patch_size_t": 2, "patch_bias": False}, lambda: {"num_frames": 17}),
    _case(
        "CogVideoXImageToVideoPipeline",
        {**ROPE, "in_channels": 8, "use_learned_positional_embeddings": True},
        lambda: {"image": _image()},
        lambda: {"image": [_image()] * 2},
    ),
    _case(
        "CogVideoXVideoToVideoPipeline",
        ROPE,
        lambda: {"video": [_image()] * FRAMES, "num_frames": ..., "strength": 1.0},
        lambda: {"video": [[_image()] * FRAMES] * 2},
    ),
    _case(
        "CogVideoXFunControlPipeline",
        {**ROPE, "in_channels": 8},
        lambda: {"control_video": [_image()] * FRAMES, "num_frames": ...},
        lambda: {"control_video": [[_image()] * FRAMES] * 2},
    ),
    _case("ConsisIDPipeline", {**ROPE, **FACE, "in_channels": 8}, _face, lambda: {"image": [_image()] * 2}),
)
