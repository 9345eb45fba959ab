"""Patch a pipeline in one line, see what it did, and undo it exactly.

    python examples/one_line.py

Builds a small random Wan pipeline on the spot, so it needs no download. With your own model, replace ``build()`` by
``WanPipeline.from_pretrained(...)``.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

import vidaccel


def build() -> WanPipeline:
    """A Wan pipeline with random weights: 4 layers of 4 heads, no text encoder (embeddings are passed in)."""
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=32, text_dim=64, freq_dim=64, ffn_dim=256, num_layers=4
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: WanPipeline) -> torch.Tensor:
    """One seeded clip of 33 frames, 192 x 256: a 9x12x16 token grid."""
    text = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1))
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        height=192,
        width=256,
        num_frames=33,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(2),
        output_type="pt",
    ).frames


def main() -> None:
    """Run, patch, run, report, unpatch, run."""
    pipe = build()
    before = run(pipe)

    session = vidaccel.patch(pipe, "sta")  # the one line
    accelerated = run(pipe)
    print(session.report())

    vidaccel.unpatch(pipe)
    after = run(pipe)

    print(f"\naccelerated differs from dense: {not torch.equal(accelerated, before)}")
    print(f"after unpatch, bit for bit the same as before: {torch.equal(after, before)}")
    if not torch.equal(after, before):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
