"""The Cosmos pipelines: Predict 1, 2 and 2.5, Transfer 2.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.tiny_wan import tiny_scheduler, tiny_text, tiny_vae
from tests.zoo.case import Case

HEIGHT, WIDTH = 48, 80  # latents 6x10, tokens 3x5
PROMPTS = {"prompt": ["a red ball", "a green square moving left"], "negative_prompt": ["a cat", "a cat"]}


class _Harmless:
    """In place of the guardrail models, which cannot be had offline."""

    def to(self, device: Any) -> _Harmless:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def _transformer(in_channels: int, out_channels: int, **config: Any) -> Any:
    settings = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 32,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "concat_padding_mask": False,  # needs torchvision
        **config,
    }
    return diffusers.CosmosTransformer3DModel(**settings).eval()


def _pipe(cls: str, transformer: Callable[[], Any], scheduler: Callable[[], Any], vae: Any = tiny_vae) -> Any:
    tokenizer, encoder = tiny_text()
    return getattr(diffusers, cls)(
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer(),
        vae=vae(),
        scheduler=scheduler(),
        safety_checker=_Harmless(),
    )


def _vae1() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    ).eval()


def _case(
    cls: str,
    build: Callable[[], Any],
    frames: int,
    extra: Callable[[], dict[str, Any]] = dict,
    two: Callable[[], dict[str, Any]] | None = None,
) -> Case:
    def call() -> dict[str, Any]:
        arguments = {
            "prompt": "a red ball",
            "negative_prompt": "a cat",
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": frames,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "max_sequence_length": 16,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            **extra(),
        }
        return {key: value for key, value in arguments.items() if value is not ...}

    return Case(cls, build, call, two or (lambda: PROMPTS))


def _embeds(prompts: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(prompts, 8, 32, generator=generator) for name in names}


def _given() -> dict[str, Any]:
    """Embeddings instead of prompts: the text encoder is Qwen2.5-VL."""
    return {"prompt": ..., "negative_prompt": ..., **_embeds(1)}


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _edm() -> Any:
    return diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=8, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )


class _Controls(diffusers.ModelMixin):
    """In place of the control net, which needs torchvision: a residual for each of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv3d(16, 48, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, controls_latents: torch.Tensor, **_: Any) -> tuple[list[torch.Tensor]]:
        tokens = self.embed(controls_latents).flatten(2).transpose(1, 2)
        return ([tokens, tokens * 2],)


def _transfer() -> Any:
    return diffusers.Cosmos2_5_TransferPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=_transformer(17, 16, extra_pos_embed_type=None, controlnet_block_every_n=1),
        vae=tiny_vae(),
        scheduler=tiny_scheduler("unipc"),
        controlnet=_Controls().eval(),
        safety_checker=_Harmless(),
    )


CASES = (
    _case(
        "CosmosTextToWorldPipeline",
        lambda: _pipe("CosmosTextToWorldPipeline", lambda: _transformer(4, 4), _edm, _vae1),
        17,
    ),
    _case(
        "CosmosVideoToWorldPipeline",
        lambda: _pipe("CosmosVideoToWorldPipeline", lambda: _transformer(5, 4), _edm, _vae1),
        17,
        lambda: {"image": _image()},
    ),
    _case(
        "Cosmos2VideoToWorldPipeline",
        lambda: _pipe(
            "Cosmos2VideoToWorldPipeline",
            lambda: _transformer(17, 16, extra_pos_embed_type=None),
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        ),
        9,
        lambda: {"image": _image()},
    ),
    _case(
        "Cosmos2_5_PredictBasePipeline",
        lambda: _pipe(
            "Cosmos2_5_PredictBasePipeline",
            lambda: _transformer(17, 16, extra_pos_embed_type=None),
            lambda: tiny_scheduler("unipc"),
        ),
        9,
        lambda: {"video": [_image()] * 9, **_given()},
        lambda: {"video": None, **_embeds(2)},  # a video can be given for one prompt only
    ),
    _case(
        "Cosmos2_5_TransferPipeline",
        _transfer,
        9,
        lambda: {"controls": [_image()] * 9, "num_frames_per_chunk": 9, **_given()},
        lambda: _embeds(2),
    ),
)
