"""Each pipeline of the Wan family: dense is untouched, sparse equals the oracle, undo is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vidaccel
from tests.wan_zoo import CASES, Case
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape, TokenLayout, VideoGrid
from vidaccel.patchers.registry import family_of
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


class Oracle:
    """Runs the original processor with a dense boolean token mask in raster order."""

    def __init__(self, original: Any, grid: list[VideoGrid], plan: Plan, num_heads: int) -> None:
        self.original, self.grid, self.plan, self.num_heads = original, grid, plan, num_heads

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        assert attention_mask is None
        layout = TokenLayout.of(self.grid[0], self.plan.tile)
        policy = self.plan.rules[0].policy
        heads = []
        for head in range(self.num_heads):
            blocks = build_pattern(policy.for_head(head, self.num_heads).pattern).blocks(layout)
            token = blocks[layout.block_of_token][:, layout.block_of_token]
            heads.append(token[layout.inverse][:, layout.inverse])
        mask = torch.stack(heads)[None]
        return self.original(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def oracle_run(case: Case, plan: Plan, **overrides: Any) -> torch.Tensor:
    pipe = case.make()
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if model is None:
            continue
        family = family_of(model)
        assert family is not None
        grid: list[VideoGrid] = []

        def note(module: Any, args: Any, kwargs: Any, grid: list[VideoGrid] = grid) -> None:
            latents = kwargs["hidden_states"]
            grid[:] = [VideoGrid(latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)]

        model.register_forward_pre_hook(note, with_kwargs=True)
        for _, module in family.attention_layers(model):
            module.processor = Oracle(module.processor, grid, plan, module.heads)
    return case.run(pipe, **overrides)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_plan_and_undo_are_bit_identical(case: Case) -> None:
    pipe = case.make()
    before = case.run(pipe)
    processors = dict(pipe.transformer.attn_processors)
    session = vidaccel.patch(pipe, "dense")
    assert torch.equal(case.run(pipe), before)
    report = session.report()
    assert report.calls > 0 and report.sparse_calls == 0 and report.density == 1.0 and not report.fallbacks
    vidaccel.unpatch(pipe)
    for name, processor in pipe.transformer.attn_processors.items():
        assert processor is processors[name]

    vidaccel.patch(pipe, SPARSE)
    assert not torch.equal(case.run(pipe), before)
    vidaccel.unpatch(pipe)
    assert torch.equal(case.run(pipe), before)
    assert not pipe.transformer._forward_pre_hooks and "cache_context" not in pipe.transformer.__dict__


@pytest.mark.parametrize("plan", [SPARSE, PER_HEAD], ids=lambda plan: plan.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_equals_the_oracle(case: Case, plan: Plan) -> None:
    expected = oracle_run(case, plan)
    pipe = case.make()
    session = vidaccel.patch(pipe, plan, strict=True)
    found = case.run(pipe)
    report = session.report()
    assert report.calls == report.sparse_calls > 0
    # three steps of a random fp32 model: rounding differs only by summation order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, case.run(case.make()), rtol=1e-3, atol=1e-4)  # and the mask matters


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_batch_of_two_prompts(case: Case) -> None:
    two = {"prompt": ["a red ball", "a green square"], "negative_prompt": ["a cat", "a cat"]}
    expected = oracle_run(case, PER_HEAD, **two)
    assert expected.shape[0] == 2
    pipe = case.make()
    vidaccel.patch(pipe, PER_HEAD, strict=True)
    torch.testing.assert_close(case.run(pipe, **two), expected, rtol=1e-4, atol=1e-5)


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
        expected = oracle_model(model, full, call)
        session = vidaccel.patch(model, full)
        found = model(**call)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any("in every layer" in event for event in session.report().events)


def oracle_model(model: Any, plan: Plan, call: dict[str, Any]) -> torch.Tensor:
    family = family_of(model)
    assert family is not None
    grid = [VideoGrid(*(s // p for s, p in zip(call["hidden_states"].shape[2:], (1, 2, 2), strict=True)))]
    layers = list(family.attention_layers(model))
    originals = [module.processor for _, module in layers]
    for _, module in layers:
        module.processor = Oracle(module.processor, grid, plan, module.heads)
    out = model(**call)[0]
    for (_, module), original in zip(layers, originals, strict=True):
        module.processor = original
    return out


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
