"""What is special about the Wan family; what holds for all pipelines is in ``test_zoo.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vidaccel
from tests.zoo.oracle import masked
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape, TokenLayout, VideoGrid
from vidaccel.patchers.wan import WanFamily
from vidaccel.patterns.registry import build_pattern

TILE = TileShape(2, 2, 2)  # ragged on every axis of the zoo's 3x3x5 grid
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])
SPARSE = Plan("window", (Rule(LayerPolicy((HeadPolicy(WINDOW),))),), tile=TILE)
PER_HEAD = Plan(
    "per-head",
    (
        Rule(
            LayerPolicy(
                (
                    HeadPolicy(WINDOW),
                    HeadPolicy(),
                    HeadPolicy(PatternSpec.make("sliding_tile", window=[2, 1, 2])),
                )
            )
        ),
    ),
    tile=TILE,
)


def test_coverage_is_exact() -> None:
    case = CASES[0]
    pipe = case.make()
    session = vidaccel.patch(pipe, SPARSE)
    case.run(pipe)
    report = session.report()
    assert [(entry["transformer"], entry["layer"], entry["module"]) for entry in report.layers] == [
        ("transformer", 0, "blocks.0.attn1"),
        ("transformer", 1, "blocks.1.attn1"),
    ]
    assert all(entry["calls"] == 6 for entry in report.layers)  # 3 steps, cond and uncond
    assert [entry["module"] for entry in report.not_patched] == ["transformer.blocks.*.attn2"]
    layout = TokenLayout.of(VideoGrid(3, 3, 5), TILE)
    block = layout.block_of_token
    kept = build_pattern(WINDOW).blocks(layout)[block][:, block]
    assert report.density == pytest.approx(kept.double().mean().item())


def test_both_transformers_share_one_clock() -> None:
    case = next(c for c in CASES if c.pipeline == "WanPipeline-2.2-dual")
    pipe = case.make()
    plan = Plan("second only", (Rule(LayerPolicy((HeadPolicy(WINDOW),)), transformer="transformer_2"),), tile=TILE)
    session = vidaccel.patch(pipe, plan)
    case.run(pipe, num_inference_steps=4)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for entry in session.report().layers:
        by_name.setdefault(entry["transformer"], []).append(entry)
    assert all(e["calls"] and not e["sparse_calls"] for e in by_name["transformer"])
    assert all(e["calls"] and e["calls"] == e["sparse_calls"] for e in by_name["transformer_2"])


def test_vace_control_blocks_are_patched_too() -> None:
    case = next(c for c in CASES if c.pipeline == "WanVACEPipeline")
    pipe = case.make()
    session = vidaccel.patch(pipe, SPARSE)
    case.run(pipe)
    modules = [entry["module"] for entry in session.report().layers]
    assert modules == [f"blocks.{i}.attn1" for i in range(3)] + [f"vace_blocks.{i}.attn1" for i in range(2)]


def test_short_vace_control_reorders_per_layer() -> None:
    """A control clip shorter than the video is zero-padded after its embedding, in raster order."""
    case = next(c for c in CASES if c.pipeline == "WanVACEPipeline")
    pipe = case.make()
    model = pipe.transformer
    generator = torch.Generator().manual_seed(3)
    call = {
        "hidden_states": torch.randn(1, 16, 3, 6, 10, generator=generator),
        "control_hidden_states": torch.randn(1, 96, 2, 6, 10, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "return_dict": False,
    }
    full = Plan(
        "full window",
        (Rule(LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[2, 2, 2])),))),),
        tile=TILE,
    )
    with torch.no_grad():
        with masked(WanFamily(), model, full):
            expected = model(**call)[0]
        session = vidaccel.patch(model, full)
        found = model(**call)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any("in every layer" in event for event in session.report().events)


def test_batched_guidance_equals_separate_passes() -> None:
    """[uncond, cond] in one batch gives what two passes give."""
    model = CASES[0].make().transformer
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 16, 3, 6, 10, generator=generator)
    texts = torch.randn(2, 16, 32, generator=generator)
    vidaccel.patch(model, PER_HEAD, strict=True)
    with torch.no_grad():
        batched = model(latents.repeat(2, 1, 1, 1, 1), torch.tensor([500.0, 500.0]), texts, return_dict=False)[0]
        single = [model(latents, torch.tensor([500.0]), text[None], return_dict=False)[0] for text in texts]
    torch.testing.assert_close(batched, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_causal_mask_of_the_model_is_honoured() -> None:
    """SkyReels with causal blocks passes an S x S mask; no kernel here takes one, so the call is dense and reported."""
    case = next(c for c in CASES if c.pipeline == "SkyReelsV2DiffusionForcingPipeline")
    pipe = case.make()
    expected = case.run(pipe, ar_step=1, causal_block_size=1 + 2)
    session = vidaccel.patch(pipe, SPARSE)
    found = case.run(pipe, ar_step=1, causal_block_size=1 + 2)
    assert torch.equal(found, expected)
    report = session.report()
    assert report.sparse_calls == 0
    assert any("attention mask" in reason for reason in report.fallbacks)


def test_foreign_processor_is_left_alone_loudly() -> None:
    class Mine:
        def __init__(self, original: Any) -> None:
            self.original = original

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.original(*args, **kwargs)

    pipe = CASES[0].make()
    mine = Mine(pipe.transformer.blocks[1].attn1.processor)
    pipe.transformer.blocks[1].attn1.processor = mine
    with pytest.raises(vidaccel.StrictError, match="blocks.1.attn1 cannot be patched: its processor is a Mine"):
        vidaccel.patch(pipe, SPARSE, strict=True)
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"  # nothing half-patched
    session = vidaccel.patch(pipe, SPARSE)
    assert pipe.transformer.blocks[1].attn1.processor is mine
    assert {"module": "transformer.blocks.1.attn1"}.items() <= session.not_patched[0].items()
    CASES[0].run(pipe)
    assert [entry["module"] for entry in session.report().layers] == ["blocks.0.attn1"]
