"""The Wan-Animate pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.tiny_wan import tiny_scheduler, tiny_text, tiny_vae
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5 behind the reference's 3x5
FACE = 16


def _pipe() -> Any:
    tokenizer, encoder = tiny_text()
    transformer = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        image_dim=8,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=FACE,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32
    )
    return diffusers.WanAnimatePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        scheduler=tiny_scheduler("unipc"),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=CLIPVisionModel(vision).eval(),
        transformer=transformer.eval(),
    )


def _image(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    pixels = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _call() -> dict[str, Any]:
    return {
        "image": _image(),
        "pose_video": [_image()] * FRAMES,
        "face_video": [_image(FACE, FACE)] * FRAMES,
        "prompt": "a red ball",
        "negative_prompt": "a cat",
        "height": HEIGHT,
        "width": WIDTH,
        "segment_frame_length": FRAMES,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }


def _two() -> dict[str, Any]:
    return {"prompt": ["a red ball", "a green square moving left"], "negative_prompt": ["a cat", "a cat"]}


CASES = (Case("WanAnimatePipeline", _pipe, _call, _two),)
