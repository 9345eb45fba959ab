"""The LTX-2 pipelines, fed with text embeddings: their encoder is Gemma 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image

from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 96, 160, 17  # token grid 3x3x5
TEXT, LAYERS, TOKENS = 8, 2, 8  # channels and layers of the encoder, tokens of a prompt

KEYFRAMES = {"use_keyframes_abs_pos_embedding": True}
GATED = {"perturbed_attn": True} | {
    f"{stream}{name}": True for stream in ("", "audio_") for name in ("gated_attn", "cross_attn_mod")
}


def _parts(**config: Any) -> dict[str, Any]:
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    connectors = LTX2TextConnectors(
        caption_channels=TEXT,
        text_proj_in_factor=LAYERS,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=3,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=24,
        num_layers=2,
        caption_channels=TEXT,
        rope_double_precision=False,
        rope_type="split",
        **config,
    )
    models = {
        "vae": vae,
        "audio_vae": audio_vae,
        "connectors": connectors,
        "vocoder": vocoder,
        "transformer": transformer,
    }
    return {name: model.eval() for name, model in models.items()}


def _pipe(cls: str, config: dict[str, Any] | None = None, **more: Any) -> Any:
    """A pipeline with a transformer of this ``config`` and ``more`` components."""
    arguments = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "tokenizer": None,
        **_parts(**(config or {})),
        **more,
    }
    return getattr(diffusers, cls)(**arguments)


def _text(*lengths: int, negative: bool = True) -> dict[str, Any]:
    """Embeddings of prompts of these lengths, padded on the left as the pipeline does, and of negative prompts."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {}
    for prefix in ("", "negative_") if negative else ("",):
        valid = lengths if not prefix else (4,) * len(lengths)
        found[f"{prefix}prompt_embeds"] = torch.randn(len(valid), TOKENS, TEXT * LAYERS, generator=generator)
        found[f"{prefix}prompt_attention_mask"] = torch.tensor([[0] * (TOKENS - n) + [1] * n for n in valid])
    return found


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _case(
    name: str,
    extra: Callable[[], dict[str, Any]] = dict,
    config: dict[str, Any] | None = None,
    *,
    two: bool = True,
    **more: Any,
) -> Case:
    cls = name.split("-")[0]

    def call() -> dict[str, Any]:
        arguments = {
            **_text(5),
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "audio_guidance_scale": 3.0,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            **extra(),
        }
        return {key: value for key, value in arguments.items() if value is not ...}

    return Case(name, lambda: _pipe(cls, config), call, (lambda: _text(5, 8)) if two else None, **more)


def _dfr() -> dict[str, Any]:
    return {
        **_text(5, negative=False),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "sigmas": [1.0, 0.5],
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }


def _refine_pipe() -> Any:
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=8, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    )
    return _pipe(
        "LTX2DFRTemporalRefinePipeline",
        KEYFRAMES,
        scheduler=diffusers.LTXEulerAncestralRFScheduler(eta=0.5),
        temporal_latent_upsampler=upsampler.eval(),
    )


def _refine() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    return {
        **_dfr(),
        "num_frames": 25,
        "sigmas": [0.9, 0.5],
        "latents": torch.randn(1, 8, 4, 3, 5, generator=generator),
        "keyframes_latents": torch.randn(1, 8, 1, 3, 5, generator=generator),
        "keyframe_positions": [24],
        "audio_latents": torch.randn(1, 2, 26, 2, generator=generator),
    }


CASES = (
    _case("LTX2Pipeline"),
    _case(
        "LTX2Pipeline-perturbed",
        lambda: {"stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [0, 1]},
        {"perturbed_attn": True},
    ),
    _case("LTX2Pipeline-2.3", config=GATED),
    _case("LTX2ImageToVideoPipeline", lambda: {"image": _image(), "image_crf": 0}),
    _case("LTX2ConditionPipeline", lambda: {"conditions": LTX2VideoCondition(frames=_image(), crf=0)}),
    _case(
        "LTX2InContextPipeline",
        lambda: {"reference_conditions": [LTX2ReferenceCondition(frames=[_image()] * FRAMES)]},
    ),
    _case(
        "LTX2InContextPipeline-weak",
        lambda: {
            "reference_conditions": [LTX2ReferenceCondition(frames=[_image()] * FRAMES)],
            "conditioning_attention_strength": 0.5,
        },
        two=False,
        sparse=False,
        reason="an attention mask of float32 weights",
    ),
    _case(
        "LTX2HDRPipeline",
        lambda: {
            "reference_conditions": [LTX2ReferenceCondition(frames=[_image()] * FRAMES)],
            "audio_guidance_scale": ...,
            "audio_stg_scale": ...,
        },
    ),
    Case(
        "LTX2DFRPipeline",
        lambda: _pipe("LTX2DFRPipeline", KEYFRAMES),
        _dfr,
        sparse=False,
        reason="coordinates of tokens",
    ),
    Case("LTX2DFRTemporalRefinePipeline", _refine_pipe, _refine, sparse=False, reason="coordinates of tokens"),
)
