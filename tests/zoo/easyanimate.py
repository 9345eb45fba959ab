"""The EasyAnimate pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5


class _Control(diffusers.EasyAnimateControlPipeline):
    """In diffusers 0.42.1 the pipeline calls its own ``encode_prompt`` with an argument that this does not take."""

    def encode_prompt(self, *args: Any, text_encoder_index: int = 0, **kwargs: Any) -> Any:
        return super().encode_prompt(*args, **kwargs)


def _vae() -> Any:
    return diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    ).eval()


def _pipe(cls: Any, in_channels: int) -> Any:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=4,
        mmdit_layers=2,  # the other two have one stream
        sample_width=10,
        sample_height=6,
        patch_size=2,
        resize_inpaint_mask_directly=False,  # the other way reads a VAE setting that diffusers 0.42.1 does not have
    )
    return cls(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _embeds(*lengths: int) -> dict[str, Any]:
    """A prompt of each length, padded to 8, and a negative one of 4: the text encoder is Qwen2-VL."""
    generator = torch.Generator().manual_seed(3)
    prompts = len(lengths)
    return {
        "prompt_embeds": torch.randn(prompts, 8, 16, generator=generator),
        "prompt_attention_mask": torch.arange(8) < torch.tensor(lengths)[:, None],
        "negative_prompt_embeds": torch.randn(prompts, 8, 16, generator=generator),
        "negative_prompt_attention_mask": (torch.arange(8) < 4).expand(prompts, 8),
    }


def _video(prompts: int) -> torch.Tensor:
    return torch.rand(prompts, 3, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))


def _case(
    pipeline: str,
    in_channels: int,
    extra: Callable[[int], dict[str, Any]] = lambda prompts: {},
    cls: Any = None,
) -> Case:
    """A pipeline that needs ``extra(number of prompts)`` beside the common arguments."""
    cls = cls or getattr(diffusers, pipeline)

    def call() -> dict[str, Any]:
        return {
            **_embeds(5),
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            **extra(1),
        }

    return Case(pipeline, lambda: _pipe(cls, in_channels), call, lambda: {**_embeds(5, 8), **extra(2)})


def _inpaint(prompts: int) -> dict[str, Any]:
    mask = torch.zeros(prompts, 1, FRAMES, HEIGHT, WIDTH)
    mask[:, :, 1:] = 255
    return {"video": _video(prompts), "mask_video": mask}


def _control(prompts: int) -> dict[str, Any]:
    return {"control_video": _video(prompts), "ref_image": _video(prompts)[:, :, :1]}


CASES = (
    _case("EasyAnimatePipeline", 4),
    _case("EasyAnimateInpaintPipeline", 12, _inpaint),
    _case("EasyAnimateControlPipeline", 12, _control, _Control),
)
