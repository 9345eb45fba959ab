"""The Helios pipelines: chunks of video, each with the history of those before."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.tiny_wan import tiny_text, tiny_vae
from tests.zoo.case import Case

HEIGHT, WIDTH = 48, 80  # latents 6x10, tokens 3x5
PROMPTS = {"prompt": ["a red ball", "a green square moving left"], "negative_prompt": ["a cat", "a cat"]}


def _pipe(cls: str, scheduler: Any, **config: Any) -> Any:
    tokenizer, encoder = tiny_text()
    transformer = diffusers.HeliosTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 6, 6),
        **config,
    )
    return getattr(diffusers, cls)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )


def _call() -> dict[str, Any]:
    return {
        "prompt": "a red ball",
        "negative_prompt": "a cat",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": 18,  # two chunks of 3 latent frames
        "num_latent_frames_per_chunk": 3,
        "history_sizes": [4, 2, 1],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }


def _pyramid() -> Any:
    # with the default gamma of 1/3 its block noise has a singular covariance
    scheduler = diffusers.HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.25)
    return _pipe("HeliosPyramidPipeline", scheduler)


def _pyramid_call() -> dict[str, Any]:
    call = {**_call(), "height": 96, "width": 160, "pyramid_num_inference_steps_list": [2, 2]}  # 3x3x5, then 3x6x10
    del call["num_inference_steps"]
    return call


CASES = (
    Case(
        "HeliosPipeline",
        lambda: _pipe("HeliosPipeline", diffusers.HeliosScheduler(stages=1, stage_range=[0, 1])),
        _call,
        lambda: PROMPTS,
    ),
    Case(
        "HeliosPipeline-amplified-history",
        lambda: _pipe(
            "HeliosPipeline", diffusers.HeliosScheduler(stages=1, stage_range=[0, 1]), is_amplify_history=True
        ),
        _call,
    ),
    Case("HeliosPyramidPipeline", _pyramid, _pyramid_call, lambda: PROMPTS),
)
