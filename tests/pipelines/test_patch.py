"""The one line and its undo: errors that name the fix, LoRA, offloading, other backends, forgetting a pipeline."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import vidaccel
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape, VideoGrid
from vidaccel.patchers.fingerprint import fingerprint_of
from vidaccel.patchers.registry import family_of

T2V = CASES[0]
SPARSE = Plan(
    "window",
    (Rule(LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),))),),
    tile=TileShape(2, 2, 2),
)


@pytest.fixture
def pipe() -> Any:
    return T2V.make()


# -- errors ---------------------------------------------------------------------------------------------------------


def test_patching_twice(pipe: Any) -> None:
    vidaccel.patch(pipe, "dense")
    with pytest.raises(vidaccel.AlreadyPatchedError, match=r"plan 'dense'; call vidaccel\.unpatch\(pipe\) first"):
        vidaccel.patch(pipe, SPARSE)
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, SPARSE)


def test_unpatching_what_was_not_patched(pipe: Any) -> None:
    with pytest.raises(vidaccel.NotPatchedError, match=r"call vidaccel\.patch\(pipe\) before"):
        vidaccel.unpatch(pipe)


def test_no_video_transformer(pipe: Any) -> None:
    with pytest.raises(
        vidaccel.UnsupportedModelError, match="AutoencoderKLWan has no video transformer .* known are A"
    ):
        vidaccel.patch(pipe.vae, "dense")
    with pytest.raises(vidaccel.UnsupportedModelError, match="takes a diffusers pipeline or a transformer, not a str"):
        vidaccel.patch("wan", "dense")
    pipe.transformer = None
    with pytest.raises(vidaccel.UnsupportedModelError, match=r"its modules: .*UMT5EncoderModel"):
        vidaccel.patch(pipe, "dense")


def test_unknown_preset_and_kernel(pipe: Any) -> None:
    with pytest.raises(vidaccel.ConfigError, match="radial"):  # the message lists the presets
        vidaccel.patch(pipe, "stta")
    with pytest.raises(vidaccel.ConfigError, match="no kernel 'cuda'; valid are .*torch-sparse"):
        vidaccel.patch(pipe, SPARSE, kernel="cuda")
    assert vidaccel.session_of(pipe) is None


def test_head_count_that_does_not_fit(pipe: Any) -> None:
    policy = LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),) * 5)
    vidaccel.patch(pipe, Plan("five heads", (Rule(policy),)))
    with pytest.raises(vidaccel.ConfigError, match="5 head entries, but the layer has 3 heads"):
        T2V.run(pipe)


def test_plan_for_another_model_or_grid(pipe: Any, tmp_path: Path) -> None:
    family = family_of(pipe.transformer)
    assert family is not None
    mine = fingerprint_of(family, pipe.transformer, pipe.scheduler, VideoGrid(3, 3, 5))
    made = Plan("mine", SPARSE.rules, tile=SPARSE.tile, fingerprint=mine)
    vidaccel.save_plan(made, tmp_path / "mine.safetensors")
    session = vidaccel.patch(pipe, tmp_path / "mine.safetensors", strict=True)
    T2V.run(pipe)
    assert session.report().sparse_calls == 12
    with pytest.raises(vidaccel.PlanMismatchError, match="made for a 3x3x5 token grid and this video has 3x3x6"):
        T2V.run(pipe, width=96)
    vidaccel.unpatch(pipe)

    with pytest.warns(vidaccel.VidaccelWarning, match="3x3x5 token grid and this video has 3x3x6"):
        session = vidaccel.patch(pipe, made, allow_mismatch=True)
        T2V.run(pipe, width=96)
    assert session.report().sparse_calls == 12  # the windows carry over to the other grid

    other = CASES[1].make()
    other.transformer = T2V.make().transformer
    other.transformer.register_to_config(ffn_dim=48)
    with pytest.raises(vidaccel.PlanMismatchError) as caught:
        vidaccel.patch(other, made)
    for phrase in (
        "config ffn_dim is 48, the plan was made for 32",
        "scheduler is FlowMatchEuler",
        "allow_mismatch=True",
    ):
        assert phrase in str(caught.value)
    with pytest.warns(vidaccel.VidaccelWarning) as warned:
        vidaccel.patch(other, made, allow_mismatch=True)
    assert ["ffn_dim" in str(w.message) for w in warned] == [True, False]  # one a transformer


# -- what people do to pipelines ------------------------------------------------------------------------------------


def _add_lora(pipe: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe.transformer.add_adapter(
            LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        )


@pytest.mark.parametrize("plan", ["dense", SPARSE], ids=["dense", "window"])
def test_lora_before_and_after_patching(plan: Any) -> None:
    before, after, plain = T2V.make(), T2V.make(), T2V.make()
    _add_lora(before)
    unpatched = T2V.run(before)
    vidaccel.patch(before, plan)
    vidaccel.patch(after, plan)
    vidaccel.patch(plain, plan)
    _add_lora(after)
    with_lora = T2V.run(before)
    assert torch.equal(T2V.run(after), with_lora)
    assert not torch.allclose(T2V.run(plain), with_lora, atol=1e-3)  # the adapter has an effect
    for pipe in (before, after):
        vidaccel.unpatch(pipe)
        assert torch.equal(T2V.run(pipe), unpatched)


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_model_cpu_offload(first: str) -> None:
    """Offloading replaces each module's forward and re-registers its hooks after every call; ours must survive that."""
    plain = T2V.run(T2V.make())
    reference = T2V.make()
    vidaccel.patch(reference, SPARSE)
    expected = T2V.run(reference)

    pipe = T2V.make()
    if first == "patch":
        session = vidaccel.patch(pipe, SPARSE, strict=True)
    pipe.enable_model_cpu_offload(device="cpu")  # the only device here; the hooks are the same
    if first == "offload":
        session = vidaccel.patch(pipe, SPARSE, strict=True)
    for _ in range(2):
        session.reset_stats()
        assert torch.equal(T2V.run(pipe), expected)
        assert session.report().sparse_calls == 12
    vidaccel.unpatch(pipe)
    assert torch.equal(T2V.run(pipe), plain)


def test_fused_projections(pipe: Any) -> None:
    for block in pipe.transformer.blocks:
        block.attn1.fuse_projections()
    fused = T2V.run(pipe)
    vidaccel.patch(pipe, "dense")
    assert torch.equal(T2V.run(pipe), fused)


def test_attention_backend_chosen_while_patched_survives(pipe: Any) -> None:
    session = vidaccel.patch(pipe, SPARSE)
    for block in pipe.transformer.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    vidaccel.unpatch(pipe)
    assert session.closed
    assert {block.attn1.processor._attention_backend for block in pipe.transformer.blocks} == {"_native_math"}


def test_dense_calls_use_the_users_backend(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    seen = []
    real = attention_dispatch.dispatch_attention_fn
    monkeypatch.setattr(
        attention_dispatch, "dispatch_attention_fn", lambda *a, **k: (seen.append(k["backend"]), real(*a, **k))[1]
    )
    vidaccel.patch(pipe, "dense")
    for block in pipe.transformer.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    T2V.run(pipe)
    assert set(seen) == {"_native_math"} and len(seen) == 12


def test_scheduler_swapped_after_patching(pipe: Any) -> None:
    from tests.tiny_wan import tiny_scheduler

    session = vidaccel.patch(pipe, SPARSE, strict=True)
    pipe.scheduler = tiny_scheduler("euler")
    T2V.run(pipe)
    assert session.report().sparse_calls == 12


def test_save_pretrained_while_patched(pipe: Any, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    plain = T2V.run(pipe)
    vidaccel.patch(pipe, SPARSE)
    pipe.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(T2V.run(loaded), plain)


def test_a_forgotten_pipeline_is_freed() -> None:
    pipe = T2V.make()
    vidaccel.patch(pipe, SPARSE)
    T2V.run(pipe)
    model = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert model() is None


def test_bare_transformer_and_statistics(pipe: Any) -> None:
    model = copy.deepcopy(pipe.transformer)
    session = vidaccel.patch(model, SPARSE)
    assert "no attention call yet, 2 layers patched" in str(session.report())
    with torch.no_grad():
        model(torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32))
    report = session.report()
    assert report.calls == 2
    text = str(report)
    assert "blocks.*.attn2" in text and "torch-sparse x1" in text
    session.reset_stats()
    assert session.report().calls == 0
    session.close()
    session.close()  # twice is once
    assert vidaccel.session_of(model) is None


def test_half_a_patch_is_never_left_behind(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidaccel.patchers import wan

    processors = dict(pipe.transformer.attn_processors)
    made = []
    real = wan.WanFamily.processor

    def processor(self: Any, original: Any) -> Any:
        if made:
            raise RuntimeError("boom")
        made.append(original)
        return real(self, original)

    monkeypatch.setattr(wan.WanFamily, "processor", processor)
    with pytest.raises(RuntimeError, match="boom"):
        vidaccel.patch(pipe, SPARSE)
    assert dict(pipe.transformer.attn_processors) == processors
    assert not pipe.transformer._forward_pre_hooks and vidaccel.session_of(pipe) is None


def test_a_model_with_nothing_to_gain_is_left_dense_and_told() -> None:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=16, norm_type="ada_norm_single", video_length=2,
    )  # fmt: skip
    processors = dict(model.named_modules())
    with pytest.warns(vidaccel.VidaccelWarning, match="transformer .* stays dense: it attends within frames"):
        session = vidaccel.patch(model, SPARSE)
    assert [entry["module"] for entry in session.report().not_patched] == ["transformer"]
    assert dict(model.named_modules()) == processors
    with pytest.raises(vidaccel.AlreadyPatchedError):
        vidaccel.patch(model, SPARSE)
    vidaccel.unpatch(model)
    with pytest.raises(vidaccel.StrictError, match="stays dense"):
        vidaccel.patch(model, SPARSE, strict=True)
    assert vidaccel.session_of(model) is None


def test_perturbed_attention_guidance_still_perturbs(pipe: Any) -> None:
    """It replaces the result of torch's attention function by V, so the call has to get there."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    attn = pipe.transformer.blocks[1].attn1
    plain = attn.forward

    def perturbed(*args: Any, **kwargs: Any) -> torch.Tensor:
        with AttentionScoreSkipFunctionMode():
            return plain(*args, **kwargs)

    untouched = CASES[0].run(pipe)
    attn.forward = perturbed
    expected = CASES[0].run(pipe)
    assert not torch.equal(untouched, expected)
    vidaccel.patch(pipe, "dense")
    assert torch.equal(CASES[0].run(pipe), expected)
    vidaccel.unpatch(pipe)
    session = vidaccel.patch(pipe, SPARSE)
    CASES[0].run(pipe)
    first, second = session.report().layers
    assert first["sparse_calls"] == first["calls"] and not first["fallbacks"]
    assert second["sparse_calls"] == 0 and sum(second["fallbacks"].values()) == second["calls"]
    assert all("perturbed attention guidance" in reason for reason in second["fallbacks"])


def test_a_modular_pipeline_can_be_patched(pipe: Any) -> None:
    from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks

    class Denoise(ModularPipelineBlocks):
        model_name = "wan"

        @property
        def expected_components(self) -> list[Any]:
            from diffusers import WanTransformer3DModel
            from diffusers.modular_pipelines import ComponentSpec

            return [ComponentSpec("transformer", WanTransformer3DModel)]

    modular = ModularPipeline(Denoise())
    modular.update_components(transformer=pipe.transformer)
    session = vidaccel.patch(modular, SPARSE)
    assert len(session.sites) == 2 and vidaccel.session_of(modular) is session
    vidaccel.unpatch(modular)
    assert vidaccel.session_of(modular) is None
