"""Trained parts in a real pipeline: from a checkpoint in its published names to the layer that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vidaccel
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo import cogvideox, hunyuan_video
from tests.zoo.case import Case
from tests.zoo.wan import CASES
from vidaccel import CompensationSpec, HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape, VidaccelWarning
from vidaccel.compensation import Coarse
from vidaccel.patchers.registry import family_of
from vidaccel.patterns import Heads

pytestmark = pytest.mark.full

CASE = next(case for case in CASES if case.pipeline == "WanPipeline")
DUAL = next(case for case in CASES if case.make().components.get("transformer_2") is not None)
#: Text beside the video in self-attention: before it, and behind it with padding.
JOINT = (cogvideox.CASES[0], hunyuan_video.CASES[0])
TILE = TileShape(2, 2, 2)
TOP_K = PatternSpec.make("pooled_top_k", density=0.3)
WIDTH = 48


def plan(compensation: str | CompensationSpec, pattern: PatternSpec = TOP_K, **where: Any) -> Plan:
    return Plan("test", (Rule(LayerPolicy((HeadPolicy(pattern, compensation=compensation),)), **where),), tile=TILE)


def gates(*, zero: bool = False, layers: int = 2) -> dict[str, torch.Tensor]:
    """As FastVideo names them, among others of the model."""
    draw = torch.Generator().manual_seed(7)
    found = {"blocks.0.to_q.weight": torch.ones(WIDTH, WIDTH)}
    for i in range(layers):
        found[f"blocks.{i}.to_gate_compress.weight"] = torch.randn(WIDTH, WIDTH, generator=draw) * (not zero)
        found[f"blocks.{i}.to_gate_compress.bias"] = torch.randn(WIDTH, generator=draw) * (not zero)
    return found


def projections(*, zero: bool = False) -> dict[str, torch.Tensor]:
    """As TurboDiffusion names them."""
    draw = torch.Generator().manual_seed(7)
    found = {}
    for i in range(2):
        name = f"net.blocks.{i}.self_attn.attn_op.local_attn.proj_l"
        found[f"{name}.weight"] = torch.randn(16, 16, generator=draw) * (not zero)
        found[f"{name}.bias"] = torch.randn(16, generator=draw) * (not zero)
    return found


def seer_gates() -> dict[str, torch.Tensor]:
    """As SeerAttention names them."""
    draw = torch.Generator().manual_seed(7)
    name = "model.layers.{}.self_attn.attn_gate.attngate_linear_{}.weight"
    shapes = {"q": (3, 1, 16, 8), "k": (3, 48, 8)}
    return {name.format(i, x): torch.randn(shape, generator=draw) for i in range(2) for x, shape in shapes.items()}


def ran(pipe: Any, what: Plan, **arguments: Any) -> tuple[torch.Tensor, vidaccel.Session]:
    """The output of a strict run; the pipeline is as before afterwards."""
    session = vidaccel.patch(pipe, what, strict=True, **arguments)
    out = CASE.run(pipe)
    vidaccel.unpatch(pipe)
    return out, session


@pytest.mark.parametrize(("name", "weights"), [("coarse", gates), ("linear", projections)])
def test_from_a_file_and_at_the_start_of_training(name: str, weights: Any, tmp_path: Path) -> None:
    pipe = CASE.make()
    modules, state = dict(pipe.transformer.named_buffers()), list(pipe.transformer.state_dict())
    dense = CASE.run(pipe)
    plain, session = ran(pipe, plan("none"))
    assert not session.report().events
    save_file(weights(), tmp_path / "trained.safetensors")
    trained, session = ran(pipe, plan(name), weights=tmp_path / "trained.safetensors")
    assert bool(trained.isfinite().all()) and not torch.equal(trained, plain)
    report = session.report()
    assert report.sparse_calls == report.calls == 12 and not report.events
    again, _ = ran(pipe, plan(name), weights=str(tmp_path))
    assert torch.equal(again, trained)

    zero, session = ran(pipe, plan(name), weights=weights(zero=True))
    assert torch.equal(zero, plain) and not session.report().events
    none, session = ran(pipe, plan(name))
    assert torch.equal(none, plain)
    (note,) = session.report().events
    assert f"{name} has no " in note and "so it adds nothing" in note

    assert dict(pipe.transformer.named_buffers()).keys() == modules.keys()
    assert list(pipe.transformer.state_dict()) == state
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
    assert torch.equal(CASE.run(pipe), dense)


@pytest.mark.parametrize("case", [CASE, *JOINT], ids=str)
def test_gates_take_what_the_layer_took(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states reach the rule in layout order, from the layer and the pass that is running."""
    seen: list[Heads] = []
    attend = Coarse.attend

    def watched(self: Coarse, call: Any) -> torch.Tensor:
        seen.append(call.heads)
        return attend(self, call)

    monkeypatch.setattr(Coarse, "attend", watched)
    pipe = case.make()
    family = family_of(pipe.transformer)
    assert family is not None
    layers = list(family.attention_layers(pipe.transformer))
    weights = {}
    for path, module in layers:
        shape = module.to_v.weight.shape
        weights[f"{path.rsplit('.', 1)[0]}.to_gate_compress.weight"] = torch.randn(shape)
    session = vidaccel.patch(pipe, plan("coarse"), strict=True, weights=weights)
    assert bool(case.run(pipe).isfinite().all())
    assert len(seen) >= session.report().calls == session.report().sparse_calls > 0
    for heads in seen:
        start = heads.layout.video_start
        video = slice(start, start + heads.layout.grid.tokens)
        assert heads.hidden is not None and heads.hidden.shape[1] == heads.layout.tokens
        expected = layers[heads.layer][1].to_v(heads.hidden[:, video])
        torch.testing.assert_close(expected.view(heads.v[:, video].shape), heads.v[:, video])


def test_tokens_reordered_in_every_layer_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidaccel.patchers.wan import WanFamily

    pipe = CASE.make()
    once, _ = ran(pipe, plan("coarse"), weights=gates())
    monkeypatch.setattr(WanFamily, "tiles_once", lambda self, model, call: False)
    each, session = ran(pipe, plan("coarse"), weights=gates())
    assert "reordered in every layer" in "".join(session.report().events)
    assert_rounded(each, once, bound_of_case(CASE))


def test_half_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with a gate and heads without, each by its own number."""
    pipe = CASE.make()
    gated, plain = HeadPolicy(TOP_K, compensation="coarse"), HeadPolicy(TOP_K)
    weights = gates()
    mixed = Plan("mixed", (Rule(LayerPolicy((plain, gated, gated))),), tile=TILE)
    found, _ = ran(pipe, mixed, weights=weights)
    for i in range(2):  # the same by a gate of zero for head 0
        weights[f"blocks.{i}.to_gate_compress.weight"][:16] = 0
        weights[f"blocks.{i}.to_gate_compress.bias"][:16] = 0
    expected, _ = ran(pipe, plan("coarse"), weights=weights)
    assert_rounded(found, expected, bound_of_case(CASE))
    dropped, _ = ran(pipe, plan("none"))
    assert not torch.allclose(found, dropped)


def test_guidance_branches_may_differ() -> None:
    """A rule for one branch alone changes that branch's calls and takes their input."""
    pipe = CASE.make()
    everywhere, _ = ran(pipe, plan("coarse"), weights=gates())
    policy = LayerPolicy((HeadPolicy(TOP_K, compensation="coarse"),))
    both = Plan("both", (Rule(policy, branch="cond"), Rule(policy, branch="uncond")), tile=TILE)
    apart, _ = ran(pipe, both, weights=gates())
    assert torch.equal(apart, everywhere)
    rest = Rule(LayerPolicy((HeadPolicy(TOP_K),)))
    one, _ = ran(pipe, Plan("one", (Rule(policy, branch="cond"), rest), tile=TILE), weights=gates())
    plain, _ = ran(pipe, plan("none"))
    assert not torch.equal(one, everywhere) and not torch.equal(one, plain)


def test_seer_chooses_by_its_gates() -> None:
    pipe = CASE.make()
    what = plan("none", PatternSpec.make("seer", density=0.3))
    found, session = ran(pipe, what, weights=seer_gates())
    assert session.report().sparse_calls == 12
    other = {key: -tensor if "_q" in key else tensor for key, tensor in seer_gates().items()}
    assert not torch.equal(ran(pipe, what, weights=other)[0], found)
    with pytest.raises(
        vidaccel.ConfigError, match=r"runs seer, which needs SeerAttention gates .* transformer\.blocks\.0"
    ):
        vidaccel.patch(pipe, what)
    assert vidaccel.session_of(pipe) is None


@pytest.mark.parametrize("name", ["vsa", "sla", "seer"])
def test_presets(name: str) -> None:
    pipe = CASE.make()
    weights = {"vsa": gates, "sla": projections, "seer": seer_gates}[name]()
    session = vidaccel.patch(pipe, name, strict=True, weights=weights)
    assert bool(CASE.run(pipe).isfinite().all())
    assert session.report().calls == 12


@pytest.mark.parametrize("asks", [True, False])
def test_the_layers_input_goes_to_rules_that_ask_for_it(asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(Coarse, "needs_hidden", asks)
    monkeypatch.setattr(
        Coarse, "attend", lambda self, call: seen.append(call.heads.hidden is not None) or call.sparse()
    )
    pipe = CASE.make()
    vidaccel.patch(pipe, plan("coarse"), weights=gates(), strict=True)
    CASE.run(pipe)
    assert seen == [asks] * 12


# -- offloading and compiling -----------------------------------------------------------------------------------------


def test_weights_move_with_the_module() -> None:
    pipe = CASE.make()
    session = vidaccel.patch(pipe, plan("coarse"), weights=gates())
    pipe.transformer.to("meta")
    (weights, *_) = [site.weights(torch.device("meta")) for site in session.sites]
    assert weights["gate.weight"].is_meta and weights.keys() == {"gate.weight", "gate.bias"}
    low = CASE.make()
    low.transformer.to(torch.bfloat16)
    session = vidaccel.patch(low, plan("coarse"), weights=gates())
    assert session.sites[0].weights(torch.device("cpu"))["gate.weight"].dtype == torch.bfloat16
    vidaccel.unpatch(low)
    session = vidaccel.patch(low, plan("linear"), weights=projections())
    assert session.sites[0].weights(torch.device("cpu"))["projection.weight"].dtype == torch.float32


@pytest.mark.parametrize("first", ["offload", "patch"])
def test_sequential_offloading(first: str) -> None:
    """accelerate keeps the parameters elsewhere and brings them for each module's forward pass."""
    from accelerate import cpu_offload

    pipe = CASE.make()
    expected, _ = ran(pipe, plan("coarse"), weights=gates())
    pipe = CASE.make()
    if first == "offload":
        cpu_offload(pipe.transformer, execution_device="cpu")
    vidaccel.patch(pipe, plan("coarse"), strict=True, weights=gates())
    if first == "patch":
        cpu_offload(pipe.transformer, execution_device="cpu")
    assert torch.equal(CASE.run(pipe), expected)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_blocks(fresh_dynamo: None) -> None:
    """The hook and its hand-over are part of the graph, which is one for all layers and steps."""
    from torch._dynamo.testing import CompileCounterWithBackend

    expected, _ = ran(CASE.make(), plan("coarse"), weights=gates())
    pipe = CASE.make()
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    vidaccel.patch(pipe, plan("coarse"), strict=True, weights=gates())
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = CASE.run(pipe)
    assert counter.frame_count == 1
    assert_rounded(found, expected, bound_of_case(CASE))


# -- two transformers -------------------------------------------------------------------------------------------------


def test_two_transformers() -> None:
    pipe = DUAL.make()
    with pytest.raises(vidaccel.ConfigError, match=r"has transformer, transformer_2; give the weights of each one as"):
        vidaccel.patch(pipe, plan("coarse"), weights=gates())
    with pytest.raises(vidaccel.ConfigError, match="weights for transformer_2, and the pipeline has transformer$"):
        vidaccel.patch(CASE.make(), plan("coarse"), weights={"transformer_2": gates()})
    session = vidaccel.patch(pipe, plan("coarse"), weights={"transformer": gates(), "transformer_2": gates(zero=True)})
    assert bool(DUAL.run(pipe).isfinite().all())
    found = [
        (site.transformer.name, bool(site.weights(torch.device("cpu"))["gate.bias"].any())) for site in session.sites
    ]
    assert found == [("transformer", True)] * 2 + [("transformer_2", False)] * 2
    vidaccel.unpatch(pipe)
    session = vidaccel.patch(pipe, plan("coarse"), weights={"transformer": gates()})
    (note,) = session.report().events
    assert "in transformer_2, so it adds nothing" in note


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_weights_that_the_plan_does_not_use() -> None:
    pipe = CASE.make()
    for what in (plan("none"), plan(CompensationSpec.make("coarse", gate=0.5)), Plan.dense()):
        with pytest.raises(
            vidaccel.ConfigError, match="uses no trained tensors of the weights given, which hold VSA gates"
        ):
            vidaccel.patch(pipe, what, weights=gates())
    with pytest.warns(VidaccelWarning, match=r"also hold SLA projections .*, which plan 'test' does not use"):
        session = vidaccel.patch(pipe, plan("coarse"), weights={**gates(), **projections()})
    assert "also hold SLA projections" in session.report().events[0]


def test_weights_of_another_model() -> None:
    pipe = CASE.make()
    wrong = {**gates(), "blocks.1.to_gate_compress.weight": torch.ones(32, 32)}
    with pytest.raises(
        vidaccel.ConfigError, match=r"of transformer\.blocks\.1\.attn1 has shape \[32, 32\], and .* 48 x 48"
    ):
        vidaccel.patch(pipe, plan("coarse"), weights=wrong)
    with pytest.raises(
        vidaccel.ConfigError, match=r"of blocks\.2, and the model's attention is in blocks\.0\.attn1 to"
    ):
        vidaccel.patch(pipe, plan("coarse"), weights=gates(layers=3))
    with pytest.raises(
        vidaccel.ConfigError, match=r"needs VSA gates .* there are none for transformer\.blocks\.1\.attn1"
    ):
        vidaccel.patch(pipe, plan("coarse"), weights=gates(layers=1))
    vidaccel.patch(pipe, plan("coarse", layers=(0,)), weights=gates(layers=1))  # and none are needed there


def test_alpha_has_no_neutral_start() -> None:
    mixed = CompensationSpec.make("linear", form="complement", alpha="trained")
    with pytest.raises(vidaccel.ConfigError, match=r"runs linear, which needs SLA2 mixing weights"):
        vidaccel.patch(CASE.make(), plan(mixed))
