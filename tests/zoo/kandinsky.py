"""The Kandinsky 5 and 6 pipelines, fed with text embeddings: their encoders are Qwen2.5-VL and CLIP."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from PIL import Image

from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5
TEXT, POOLED = 16, 8


def _vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    ).eval()


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _text5(*lengths: int) -> dict[str, Any]:
    """Embeddings of prompts of these lengths, padded to the longest, and of equally many negative prompts."""
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {}
    for prefix, valid in (("", lengths), ("negative_", (4,) * len(lengths))):
        found[f"{prefix}prompt_embeds_qwen"] = torch.randn(len(valid), max(valid), TEXT, generator=generator)
        found[f"{prefix}prompt_embeds_clip"] = torch.randn(len(valid), POOLED, generator=generator)
        found[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, *valid]).cumsum(0).to(torch.int32)
    return found


def _awake(transformer: Any) -> Any:
    """Without the zeros of training's start, which close every gate."""
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


def _pipe5(cls: str) -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=POOLED,
        time_dim=16,
        out_visual_dim=4,
        model_dim=48,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    )
    return getattr(diffusers, cls)(
        transformer=_awake(transformer),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _call5() -> dict[str, Any]:
    return {
        **_text5(5),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }


def _pipe6() -> Any:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=POOLED,
        time_dim=16,
        model_dim=48,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        model_dim_a=32,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    return diffusers.Kandinsky6TI2VAPipeline(
        transformer=_awake(transformer),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        audio_vae=diffusers.MMAudioVAE(mel_bins=8, latent_channels=4, hidden_channels=8, layers_per_block=1).eval(),
        vocoder=diffusers.MMAudioVocoder(
            num_mels=8,
            upsample_initial_channel=8,
            upsample_rates=(2,),
            upsample_kernel_sizes=(4,),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ).eval(),
    )


def _text6(prompts: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        found[f"{prefix}prompt_embeds"] = torch.randn(prompts, 8, TEXT, generator=generator)
        found[f"{prefix}pooled_prompt_embeds"] = torch.randn(prompts, POOLED, generator=generator)
    return found


def _call6() -> dict[str, Any]:
    return {
        **_text6(1),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }


CASES = (
    Case("Kandinsky5T2VPipeline", lambda: _pipe5("Kandinsky5T2VPipeline"), _call5, lambda: _text5(5, 8)),
    Case(
        "Kandinsky5I2VPipeline",
        lambda: _pipe5("Kandinsky5I2VPipeline"),
        lambda: {**_call5(), "image": _image(), "num_frames": 17},  # it fits the first 4 latent frames to the rest
        lambda: _text5(5, 8),
    ),
    Case("Kandinsky6TI2VAPipeline", _pipe6, _call6, lambda: _text6(2)),
    Case("Kandinsky6TI2VAPipeline-image", _pipe6, lambda: {**_call6(), "image": _image()}),  # one frame more
    Case("Kandinsky6TI2VAPipeline-silent", _pipe6, lambda: {**_call6(), "sample_audio": False}, lambda: _text6(2)),
)
