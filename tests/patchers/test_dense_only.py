"""Models that stay dense, inside their real pipelines: alone, and beside a transformer that is patched."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch

import vidaccel
from tests.tiny_wan import tiny_scheduler, tiny_text, tiny_vae
from vidaccel import VidaccelWarning


def sana() -> Any:
    tokenizer, encoder = tiny_text()
    transformer = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        rope_max_seq_len=32,
    )
    pipe = diffusers.SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        transformer=transformer.eval(),
        scheduler=tiny_scheduler("unipc"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any) -> torch.Tensor:
    embeds = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(3))
    frames: torch.Tensor = pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=torch.ones(1, 8),
        negative_prompt_embeds=-embeds,
        negative_prompt_attention_mask=torch.ones(1, 8),
        negative_prompt=None,
        height=64,
        width=64,
        frames=9,
        num_inference_steps=2,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).frames
    return frames


def test_a_whole_pipeline_that_stays_dense_runs_as_before() -> None:
    pipe = sana()
    before = run(pipe)
    with pytest.warns(VidaccelWarning, match="stays dense: its attention is linear"):
        session = vidaccel.patch(pipe, "sta")
    assert torch.isfinite(before).all() and torch.equal(run(pipe), before)
    report = session.report()
    assert report.calls == 0 and [entry["module"] for entry in report.not_patched] == ["transformer"]
    assert "linear" in str(report)
    vidaccel.unpatch(pipe)
    with pytest.raises(vidaccel.StrictError, match="its attention is linear"):
        vidaccel.patch(pipe, "sta", strict=True)


@pytest.mark.skipif(not hasattr(diffusers, "CosmosControlNetModel"), reason="needs a newer diffusers")
@pytest.mark.parametrize("strict", [False, True])
def test_a_control_net_stays_dense_beside_a_patched_transformer(strict: bool) -> None:
    from tests.zoo import cosmos

    pipe = next(case for case in cosmos.CASES if case.pipeline == "Cosmos2_5_TransferPipeline").make()
    control = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=18,
        latent_channels=18,
        model_channels=48,
        num_attention_heads=3,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
    )
    pipe.register_modules(controlnet=control)
    processors = [block.attn1.processor for block in control.control_blocks]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VidaccelWarning)
        session = vidaccel.patch(pipe, "sta", strict=strict)
    assert len(session.sites) == 2 and {site.transformer.name for site in session.sites} == {"transformer"}
    reasons = {entry["module"]: entry["reason"] for entry in session.report().not_patched}
    assert reasons["controlnet"] == "its residuals are computed by dense attention"
    assert any("controlnet (CosmosControlNetModel) stays dense" in str(warned.message) for warned in caught)
    assert [block.attn1.processor for block in control.control_blocks] == processors
    vidaccel.unpatch(pipe)
    assert vidaccel.session_of(control) is None
    with pytest.raises(vidaccel.StrictError, match="dense attention"):
        vidaccel.patch(control, "sta", strict=True)
