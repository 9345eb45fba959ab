"""What people put in the place of what is patched: transformers, processors, wrappers. Nothing runs dense unsaid."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import vidaccel
from tests.patchers.test_zoo import SPARSE as ZOO
from tests.reliability.plans import REMEMBERS, SPARSE, alone, dense, patched
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo import cogvideox, hunyuan_video15, ltx, wan
from tests.zoo.case import Case
from vidaccel import (
    AlreadyPatchedError,
    ConfigError,
    HeadPolicy,
    PatchError,
    Plan,
    Rule,
    StrictError,
    UnsupportedModelError,
)

pytestmark = pytest.mark.full

T2V, COG = wan.CASES[0], cogvideox.CASES[0]
DUAL = next(case for case in wan.CASES if case.pipeline == "WanPipeline-2.2-dual")


# -- processors of closed sessions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [T2V, COG, ltx.CASES[0], hunyuan_video15.CASES[0]], ids=str)
def test_a_processor_put_back_after_its_session_runs_the_original(case: Case) -> None:
    """Also where ours leaves out a mask that the original builds, and after a run in tile order."""
    pipe, session = patched(case, strict=True)
    case.run(pipe)
    saved = dict(pipe.transformer.attn_processors)
    vidaccel.unpatch(pipe)
    pipe.transformer.set_attn_processor(dict(saved))
    assert torch.equal(case.run(pipe), dense(case))
    calls = session.report().calls
    again = vidaccel.patch(pipe, SPARSE, strict=True)
    assert torch.equal(case.run(pipe), alone(case)) and session.report().calls == calls
    vidaccel.unpatch(pipe)
    assert again.closed and torch.equal(case.run(pipe), dense(case))
    assert not any("Sparse" in type(p).__name__ for p in pipe.transformer.attn_processors.values())


def test_fused_projections_that_come_apart_after_the_undo() -> None:
    """diffusers keeps the processors it found, which were ours, and puts them back."""
    pipe, _ = patched(COG)
    pipe.transformer.fuse_qkv_projections()
    fused = dict(pipe.transformer.attn_processors)
    vidaccel.unpatch(pipe)
    assert pipe.transformer.attn_processors == fused, "what the user has put there stays"
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(COG.run(pipe), dense(COG))
    vidaccel.patch(pipe, SPARSE, strict=True)
    assert torch.equal(COG.run(pipe), alone(COG))


# -- what was patched is not what runs -----------------------------------------------------------------------------


def another(pipe: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return type(pipe.transformer)(**{k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")})


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_a_transformer_in_its_place_is_noticed_before_the_first_step(case: Case) -> None:
    pipe, session = patched(case, strict=True)
    old = pipe.transformer
    pipe.transformer = new = another(pipe).eval()
    steps: list[object] = []
    new.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(StrictError, match=r"transformer of \w+: it was replaced after patching by a "):
        case.run(pipe)
    assert not steps
    vidaccel.unpatch(pipe)
    assert session.closed and vidaccel.session_of(old) is None and not old._forward_pre_hooks
    assert not {"check_inputs", "progress_bar", "_vidaccel_session"} & set(pipe.__dict__)


def test_a_transformer_in_its_place_is_in_the_report() -> None:
    pipe, session = patched(T2V)
    pipe.transformer = another(pipe)
    T2V.run(pipe)
    [entry] = [entry for entry in session.report().not_patched if entry["module"] == "transformer"]
    assert "replaced after patching by a WanTransformer3DModel, which neither is patched" in entry["reason"]
    assert "left alone: transformer: it was replaced" in str(session.report())
    with pytest.raises(AlreadyPatchedError):
        vidaccel.patch(pipe, SPARSE)
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, SPARSE, strict=True)
    T2V.run(pipe)


def test_a_transformer_that_is_patched_on_its_own_may_take_the_place() -> None:
    pipe, session = patched(T2V, strict=True)
    other, own = patched(T2V, strict=True)
    pipe.transformer = other.transformer
    assert torch.equal(T2V.run(pipe), alone(T2V)) and own.report().calls > 0 == session.report().calls
    vidaccel.unpatch(pipe)
    assert session.closed and own.closed


def test_a_transformer_that_was_replaced_is_freed() -> None:
    pipe, session = patched(T2V)
    gone = weakref.ref(pipe.transformer)
    pipe.transformer = another(pipe)
    gc.collect()
    assert gone() is None and not session.closed
    vidaccel.unpatch(pipe)
    assert session.closed


SWAPS: dict[str, Callable[[Any], None]] = {
    "set_attn_processor": lambda model: model.set_attn_processor(type(model.blocks[0].attn1.processor.original)()),
    "one processor": lambda model: setattr(
        model.blocks[1].attn1, "processor", type(model.blocks[1].attn1.processor.original)()
    ),
}


@pytest.mark.parametrize("how", SWAPS)
def test_processors_in_their_place_are_noticed(how: str) -> None:
    pipe, session = patched(T2V, strict=True)
    SWAPS[how](pipe.transformer)
    with pytest.raises(StrictError, match=r"blocks\.\d\.attn1: its processor was replaced after patching by"):
        T2V.run(pipe)
    vidaccel.unpatch(pipe)

    pipe, session = patched(T2V)
    SWAPS[how](pipe.transformer)
    found = T2V.run(pipe)
    swapped = [entry for entry in session.report().not_patched if "replaced after patching" in entry["reason"]]
    assert len(swapped) == (2 if how == "set_attn_processor" else 1)
    if how == "set_attn_processor":
        assert torch.equal(found, dense(T2V)), "tokens stay in raster order for processors that are not ours"
    vidaccel.unpatch(pipe)
    assert torch.equal(T2V.run(pipe), dense(T2V))


def test_fusing_after_patching_is_noticed() -> None:
    pipe, _ = patched(COG, strict=True)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(StrictError, match="replaced after patching by FusedCogVideoXAttnProcessor2_0"):
        COG.run(pipe)


def test_a_processor_with_places_of_its_own_sees_raster_order() -> None:
    """A layer that could not be patched attends by places of the raster order; its neighbors must not shuffle it."""

    class Local:
        """Attends the tokens at most two places away."""

        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            b, s, _ = hidden_states.shape
            q, k, v = (
                x(hidden_states).view(b, s, attn.heads, -1).transpose(1, 2) for x in (attn.to_q, attn.to_k, attn.to_v)
            )
            near = (torch.arange(s)[:, None] - torch.arange(s)).abs() <= 2
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near).transpose(1, 2).flatten(2)
            return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]

    pipe = T2V.make()
    pipe.transformer.blocks[0].attn1.processor = Local()
    expected = T2V.run(pipe)
    wide = Plan.uniform("wide", HeadPolicy(vidaccel.PatternSpec.make("sliding_tile", window=[9, 9, 9])))
    session = vidaccel.patch(pipe, Plan("wide", wide.rules, tile=SPARSE.tile))
    assert_rounded(T2V.run(pipe), expected, bound_of_case(T2V))
    assert [entry["module"] for entry in session.report().not_patched if "Local" in entry["reason"]]


@pytest.fixture
def modular() -> Iterator[Any]:
    from diffusers import ClassifierFreeGuidance
    from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep

    classic = T2V.make()
    made = WanDenoiseStep().init_pipeline()
    made.update_components(
        transformer=classic.transformer, scheduler=classic.scheduler, guider=ClassifierFreeGuidance(guidance_scale=3.0)
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("how", ["update_components", "attribute"])
def test_a_modular_pipeline_notices_too(modular: Any, how: str) -> None:
    from tests.pipelines.test_modular import run

    vidaccel.patch(modular, SPARSE, strict=True)
    run(modular)
    new = another(modular).eval()
    modular.update_components(transformer=new) if how == "update_components" else setattr(modular, "transformer", new)
    with pytest.raises(StrictError, match="transformer of ModularPipeline|WanModularPipeline"):
        run(modular)
    blocks = modular._blocks
    vidaccel.unpatch(modular)
    assert type(modular._blocks) in type(blocks).__mro__ and modular._blocks is not blocks
    run(modular)


# -- names -----------------------------------------------------------------------------------------------------------


def rules_for(*names: str) -> Plan:
    rules = tuple(Rule(SPARSE.rules[0].policy, transformer=name) for name in names)
    return Plan("named", rules, tile=SPARSE.tile)


def test_unpatching_closes_the_sessions_of_transformers_that_were_patched_apart() -> None:
    pipe = DUAL.make()
    first = vidaccel.patch(pipe.transformer, SPARSE)
    second = vidaccel.patch(pipe.transformer_2, SPARSE, transformer="transformer_2")
    assert torch.equal(DUAL.run(pipe), alone(DUAL))
    vidaccel.unpatch(pipe)
    assert first.closed and second.closed and torch.equal(DUAL.run(pipe), dense(DUAL))


def test_a_bare_transformer_is_told_which_one_it_is() -> None:
    pipe, plan = DUAL.make(), rules_for("transformer_2")
    with pytest.raises(ConfigError, match=r'does not tell which of them it is; pass transformer="transformer" or "tra'):
        vidaccel.patch(pipe.transformer_2, plan)
    session = vidaccel.patch(pipe.transformer_2, plan, strict=True, transformer="transformer_2")
    DUAL.run(pipe)
    assert session.report().sparse_calls == session.report().calls > 0
    vidaccel.unpatch(pipe)
    session = vidaccel.patch(pipe.transformer, plan, transformer="transformer")
    DUAL.run(pipe)
    assert session.report().sparse_calls == 0 < session.report().calls


@pytest.mark.parametrize("name", ["vae", "transformer_3"])
def test_only_names_of_transformers_are_taken(name: str) -> None:
    with pytest.raises(ConfigError, match="it says which one a bare transformer is, transformer or transformer_2"):
        vidaccel.patch(T2V.make().transformer, SPARSE, transformer=name)
    with pytest.raises(ConfigError, match="a pipeline knows the names of its own"):
        vidaccel.patch(T2V.make(), SPARSE, transformer="transformer")


def test_rules_for_a_transformer_that_is_not_there_are_told() -> None:
    _, session = patched(T2V, rules_for("transformer", "transformer_2"))
    assert "the plan has rules for transformer_2, which this pipeline does not have" in session.report().events


def test_one_module_as_both_transformers(recwarn: pytest.WarningsRecorder) -> None:
    pipe = DUAL.make()
    pipe.transformer_2 = pipe.transformer
    expected = DUAL.run(pipe)
    session = vidaccel.patch(pipe, SPARSE, strict=True)
    assert not [w for w in recwarn if issubclass(w.category, vidaccel.VidaccelWarning)]
    DUAL.run(pipe)
    assert len(session.sites) == 2 and session.report().sparse_calls == session.report().calls == 12
    vidaccel.unpatch(pipe)
    assert torch.equal(DUAL.run(pipe), expected)
    with pytest.raises(ConfigError, match="transformer_2 of this pipeline is the same module as transformer"):
        vidaccel.patch(pipe, rules_for("transformer_2"))


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of one, which data parallelism asks for."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def lora(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_v"])).eval()  # type: ignore[arg-type]


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "PeftModel": lora,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "FullyShardedDataParallel": sharded,
    "fully_shard": fully_sharded,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "DistributedDataParallel of PeftModel": lambda model: nn.parallel.DistributedDataParallel(lora(model)),
}


def forward(model: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 3, 6, 10, generator=draw), torch.randn(1, 16, 32, generator=draw)
    with torch.no_grad():
        out: torch.Tensor = model(
            hidden_states=latents, timestep=torch.tensor([500.0]), encoder_hidden_states=text, return_dict=False
        )[0]
    return out


@pytest.mark.parametrize("order", ["wrapped before", "wrapped after"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_around_the_transformer(name: str, order: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of LoRA's matrices, which begin at zero products
        plain = forward(T2V.make().transformer)
        model = T2V.make().transformer
        vidaccel.patch(model, SPARSE, strict=True)
        expected = forward(model)
        model = T2V.make().transformer
        if order == "wrapped before":
            outer = WRAPPERS[name](model)
            session = vidaccel.patch(outer, SPARSE, strict=True)
        else:
            session = vidaccel.patch(model, SPARSE, strict=True)
            outer = WRAPPERS[name](model)
    assert vidaccel.session_of(outer) is session
    found, report = forward(outer), session.report()
    assert torch.equal(found, expected) and report.sparse_calls == report.calls == 2
    vidaccel.unpatch(outer)
    assert session.closed and torch.equal(forward(outer), plain)


@pytest.mark.parametrize("strict", [False, True])
def test_a_wrapper_that_goes_past_the_hooks_is_told(strict: bool) -> None:
    """As peft's once did; the pass before it must not be taken for this one, nor its order of tokens."""

    class Past(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, **call: Any) -> Any:
            return self.inside.forward(**call)

    model = T2V.make().transformer
    plain = forward(model)
    session = vidaccel.patch(model, SPARSE, strict=strict)
    forward(model)
    if strict:
        with pytest.raises(StrictError, match="not its blocks or its `forward`, which go past the hooks"):
            forward(Past(model))
        return
    assert torch.equal(forward(Past(model)), plain)
    assert session.report().sparse_calls == 2 and sum(session.report().fallbacks.values()) == 2


def test_a_subclass_that_takes_anything() -> None:
    kind = type(T2V.make().transformer)

    class Anything(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = Anything(**{k: v for k, v in T2V.make().transformer.config.items() if not k.startswith("_")}).eval()
    session = vidaccel.patch(model, SPARSE, strict=True)
    with torch.no_grad():
        model(torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32))
    assert session.report().sparse_calls == 2


def test_a_class_is_no_pipeline() -> None:
    import diffusers

    with pytest.raises(UnsupportedModelError, match=r"WanPipeline is a class; make a pipeline of it first"):
        vidaccel.patch(diffusers.WanPipeline, SPARSE)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_tracing_is_refused(how: str) -> None:
    model = T2V.make().transformer
    vidaccel.patch(model, SPARSE)
    inputs = torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with pytest.raises(Exception, match="would freeze what a patched transformer chooses in one step"):
        if how == "trace":
            torch.jit.trace(model, inputs, strict=False)
        else:
            torch.export.export(model, inputs, strict=False)


# -- step caches -------------------------------------------------------------------------------------------------------


def test_two_runs_at_once_do_not_mix_in_a_step_cache() -> None:
    pipe, _ = patched(T2V, Plan("cached", SPARSE.rules, tile=SPARSE.tile, cache="first-block:0.1"))
    alone_ = T2V.run(pipe)
    other = T2V.make()
    other.transformer = pipe.transformer

    def inside(*_: Any) -> dict[str, Any]:
        with pytest.raises(PatchError, match="would mix in its step cache, whose state lies on the model"):
            T2V.run(other)
        return {}

    T2V.run(pipe, callback_on_step_end=inside)
    assert torch.equal(T2V.run(pipe), alone_) and torch.equal(T2V.run(other), alone_), "one after the other is fine"


def test_an_interrupted_run_does_not_block_the_cache() -> None:
    pipe, _ = patched(T2V, Plan("cached", SPARSE.rules, tile=SPARSE.tile, cache="first-block:0.1"))
    expected = T2V.run(pipe)

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:  # its traceback keeps the frames of the run
        T2V.run(pipe, callback_on_step_end=stop)
    assert torch.equal(T2V.run(pipe), expected) and kept.tb is not None


def test_memories_go_with_the_call_that_made_them() -> None:
    from vidaccel.engine.runs import DenoisingRun

    pipe, _ = patched(T2V, REMEMBERS)
    runs: list[weakref.ref[Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        begin = DenoisingRun.__init__
        patch.setattr(DenoisingRun, "__init__", lambda self, *a: (runs.append(weakref.ref(self)), begin(self, *a))[1])
        T2V.run(pipe)
    gc.collect()
    assert runs and all(run() is None for run in runs)
