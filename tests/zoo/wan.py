"""Every pipeline of the Wan family, tiny, random and offline, with a call that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.tiny_wan import tiny_scheduler, tiny_text, tiny_transformer, tiny_vae
from tests.zoo.case import Case

HEIGHT, WIDTH, FRAMES = 48, 80, 9  # latents 3x6x10, token grid 3x3x5: ragged for every even tile
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _case(
    pipeline: str, build: Callable[[], Any], extra: Callable[[], dict[str, Any]] = dict, *, two: bool = True
) -> Case:
    """A pipeline that needs ``extra`` arguments beside the common ones; ``...`` takes one of those out."""

    def call() -> dict[str, Any]:
        arguments = {
            "prompt": "a red ball",
            "negative_prompt": "a cat",
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "num_inference_steps": 3,
            "guidance_scale": 3.0,
            "max_sequence_length": 16,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            **extra(),
        }
        return {key: value for key, value in arguments.items() if value is not ...}

    prompts = {"prompt": ["a red ball", "a green square"], "negative_prompt": ["a cat", "a cat"]}
    return Case(pipeline, build, call, two=(lambda: prompts) if two else None)


def _image() -> Image.Image:
    pixels = torch.randint(0, 255, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _common() -> dict[str, Any]:
    tokenizer, encoder = tiny_text()
    return {"tokenizer": tokenizer, "text_encoder": encoder, "vae": tiny_vae()}


def _wan(cls: str, transformer: dict[str, Any] | None = None, **more: Any) -> Any:
    return getattr(diffusers, cls)(
        **_common(),
        transformer=tiny_transformer(**{**TRANSFORMER, **(transformer or {})}),
        scheduler=more.pop("scheduler", None) or tiny_scheduler("unipc"),
        **more,
    )


def _dual() -> Any:
    second = tiny_transformer(**TRANSFORMER)
    return _wan("WanPipeline", transformer_2=second, boundary_ratio=0.8, scheduler=tiny_scheduler("euler"))


def _vace() -> Any:
    config = {**TRANSFORMER, "vace_layers": [0, 1], "vace_in_channels": 96, "num_layers": 3}
    return diffusers.WanVACEPipeline(
        **_common(),
        transformer=diffusers.WanVACETransformer3DModel(**config).eval(),
        scheduler=tiny_scheduler("unipc"),
    )


def _skyreels(cls: str, **config: Any) -> Any:
    more = {}
    if cls == "SkyReelsV2ImageToVideoPipeline":
        more = _clip()
    return getattr(diffusers, cls)(
        **_common(),
        transformer=diffusers.SkyReelsV2Transformer3DModel(**{**TRANSFORMER, **config}).eval(),
        scheduler=tiny_scheduler("unipc"),
        **more,
    )


def _clip() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32
    )
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(crop_size=32, size=32),
    }


def _chronoedit() -> Any:
    config = {**TRANSFORMER, "in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 48}
    return diffusers.ChronoEditPipeline(
        **_common(),
        **_clip(),
        transformer=diffusers.ChronoEditTransformer3DModel(**config).eval(),
        scheduler=tiny_scheduler("unipc"),
    )


def _video() -> list[Image.Image]:
    return [_image()] * FRAMES


CASES = (
    _case("WanPipeline", lambda: _wan("WanPipeline")),
    _case("WanPipeline-2.2-dual", _dual),
    _case("WanPipeline-2.2-5B", lambda: _wan("WanPipeline", expand_timesteps=True)),
    _case(
        "WanImageToVideoPipeline",
        lambda: _wan("WanImageToVideoPipeline", {"in_channels": 36}),
        lambda: {"image": _image()},
    ),
    _case(
        "WanVideoToVideoPipeline",
        lambda: _wan("WanVideoToVideoPipeline"),
        lambda: {"video": _video(), "num_frames": ..., "strength": 1.0},
    ),
    _case(
        "WanVACEPipeline",
        _vace,
        lambda: {"video": _video(), "mask": [Image.new("L", (WIDTH, HEIGHT), 255)] * FRAMES},
        two=False,
    ),
    _case(
        "LucyEditPipeline",
        lambda: _wan("LucyEditPipeline", {"in_channels": 32}),
        lambda: {"video": _video()},
        two=False,
    ),
    _case("SkyReelsV2Pipeline", lambda: _skyreels("SkyReelsV2Pipeline")),
    _case(
        "SkyReelsV2ImageToVideoPipeline",
        lambda: _skyreels("SkyReelsV2ImageToVideoPipeline", in_channels=36, image_dim=8, added_kv_proj_dim=48),
        lambda: {"image": _image(), "max_sequence_length": 512},
    ),
    _case("SkyReelsV2DiffusionForcingPipeline", lambda: _skyreels("SkyReelsV2DiffusionForcingPipeline")),
    _case(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        lambda: _skyreels("SkyReelsV2DiffusionForcingImageToVideoPipeline"),
        lambda: {"image": _image()},
    ),
    _case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        lambda: _skyreels("SkyReelsV2DiffusionForcingVideoToVideoPipeline"),
        lambda: {"video": _video(), "num_frames": 21, "overlap_history": 5},
    ),
    _case("ChronoEditPipeline", _chronoedit, lambda: {"image": _image(), "max_sequence_length": 512}),
)
