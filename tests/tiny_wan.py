"""A tiny random Wan pipeline in the real diffusers format, offline: tokenizer, UMT5, VAE, transformer, scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

__all__ = ["WORDS", "tiny_scheduler", "tiny_text", "tiny_transformer", "tiny_vae", "tiny_wan"]

#: The tokenizer's words; all others become <unk>.
WORDS = ("a", "red", "green", "blue", "circle", "square", "ball", "cat", "moving", "left", "right", "on", "plain")


def tiny_text() -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """A word-level tokenizer and a random 2-layer UMT5 encoder of width 32."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = UMT5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return tokenizer, UMT5EncoderModel(config).eval()


def tiny_vae() -> AutoencoderKLWan:
    """A random Wan VAE: 8x8 pixels and 4 frames to a latent, 16 channels."""
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def tiny_transformer(**config: Any) -> WanTransformer3DModel:
    """A random Wan transformer: 2 layers, 2 heads of 16, unless ``config`` says otherwise."""
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**settings, **config}).eval()


def tiny_scheduler(name: str = "euler") -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    """The schedulers Wan ships with: ``"euler"`` (flow match, shift 7) or ``"unipc"`` (flow shift 3)."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=7.0)
    if name == "unipc":
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        )
    raise ValueError(f"scheduler is {name!r}; valid are euler, unipc")


def tiny_wan(
    path: str | Path | None = None,
    *,
    seed: int = 0,
    dual: bool = False,
    boundary_ratio: float = 0.875,
    scheduler: str = "euler",
    text: bool = True,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> WanPipeline:
    """A tiny random ``WanPipeline``, saved to ``path`` in the real format when one is given.

    Args:
        path: folder for ``save_pretrained``.
        seed: of all weights; the global random state is left as it was.
        dual: add a ``transformer_2`` with other weights (Wan 2.2), switched at ``boundary_ratio``.
        scheduler: see `tiny_scheduler`.
        text: with tokenizer and text encoder; without, call it with ``prompt_embeds`` of width 32.
        config: of both transformers, see `tiny_transformer`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder = tiny_text() if text else (None, None)
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            vae=tiny_vae(),
            transformer=tiny_transformer(**config),
            scheduler=tiny_scheduler(scheduler),
            transformer_2=tiny_transformer(**config) if dual else None,
            boundary_ratio=boundary_ratio if dual else None,
        )
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    if path is not None:
        pipe.save_pretrained(path)
    return pipe
