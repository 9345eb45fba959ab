"""One group of heads: own token orders, compensation, skipping inside the kernel, and what is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vidaccel
from tests.rounding import assert_rounded, rounding
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule
from vidaccel.blockmask import BlockMask
from vidaccel.compensation import Call, Compensation, registry
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.engine.prepare import HeadGroup, prepare
from vidaccel.engine.run import run_heads
from vidaccel.errors import ConfigError
from vidaccel.kernels import reference
from vidaccel.kernels.contract import Skips
from vidaccel.kernels.dispatch import kernels
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, HeadOrder, Heads
from vidaccel.patterns import registry as patterns
from vidaccel.types import TileShape, VideoGrid

LAYOUT = TokenLayout.of(VideoGrid(3, 5, 6), TileShape(2, 2, 3), text_tokens=7)
KERNELS = {kernel.name: kernel for kernel in kernels()}
WINDOW = PatternSpec.make("sliding_tile", window=(1, 1, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Shuffled(DynamicPattern):
    """Sorts each head's queries by their first channel and its keys by their second; a block keeps itself and one."""

    name: ClassVar[str] = "shuffled_in_test"

    def order(self, heads: Heads) -> HeadOrder:
        return HeadOrder(self._by(heads, heads.q, 0), self._by(heads, heads.k, 1))

    @staticmethod
    def _by(heads: Heads, x: torch.Tensor, channel: int) -> torch.Tensor:
        start, stop = heads.layout.video_start, heads.layout.video_start + heads.layout.grid.tokens
        places = torch.arange(x.shape[1]).expand(x.shape[0], x.shape[2], -1).clone()
        places[..., start:stop] = x[:, start:stop, :, channel].argsort(1).transpose(1, 2) + start
        return places

    def choose(self, heads: Heads) -> torch.Tensor:
        for x, channel in ((heads.q, 0), (heads.k, 1)):
            video = x[:, heads.layout.video_start :, :, channel][:, : heads.layout.grid.tokens]
            assert (video.diff(dim=1) >= 0).all(), "choose did not see the new order"
        count = heads.layout.num_video_blocks
        keep = torch.eye(count, dtype=torch.bool) | torch.eye(count, dtype=torch.bool).roll(1, 0)
        return keep.expand(heads.q.shape[0], heads.q.shape[2], -1, -1)

    def resolved(self, layout: TokenLayout) -> str:
        return "two blocks"


@dataclass(frozen=True, kw_only=True, eq=False)
class Halved(Compensation):
    """Half of the output, from the second call on."""

    name: ClassVar[str] = "halved_in_test"
    lse: ClassVar[bool] = True

    def attend(self, call: Call) -> torch.Tensor:
        out, lse = call.sparse_with_lse()
        assert lse.shape == (call.heads.q.shape[0], call.heads.q.shape[2], call.heads.q.shape[1])
        call.memory["calls"] = call.memory.get("calls", 0) + 1
        call.add_pairs(0.25)
        return out / call.memory["calls"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(patterns._PATTERNS, Shuffled.name, Shuffled)
    monkeypatch.setitem(registry._REGISTRY.known, Halved.name, Halved)


def heads(batch: int = 2, count: int = 3, channels: int = 16) -> Heads:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, channels, count, LAYOUT.tokens, generator=draw).permute(0, 3, 2, 1) for _ in range(3))
    return Heads(q, k, v, LAYOUT)


def group(policy: HeadPolicy, count: int = 3) -> HeadGroup:
    (found,) = prepare(LayerPolicy((policy,)), count, LAYOUT)
    return found


@pytest.mark.parametrize("name", ["reference", "torch-sparse"])
@pytest.mark.parametrize("compensation", ["none", "pooled_tail"])
def test_an_order_of_its_own_permutes_and_restores(name: str, compensation: str) -> None:
    given = heads()
    policy = HeadPolicy(PatternSpec("shuffled_in_test"), compensation=compensation)
    out, density = run_heads(KERNELS[name], group(policy), given, {})

    order = Shuffled().order(given)
    wanted = torch.empty_like(given.q, dtype=torch.float64)
    count = LAYOUT.num_blocks
    keep = torch.ones(count, count, dtype=torch.bool)
    keep[LAYOUT.video_blocks, LAYOUT.video_blocks] = Shuffled().choose(given.reordered(order))[0, 0]
    mask = BlockMask.from_dense(keep)
    for b in range(2):
        for h in range(3):
            q, k, v = (
                x[b : b + 1, :, h : h + 1].double()[:, index[b, h]]
                for x, index in ((given.q, order.q), (given.k, order.k), (given.v, order.k))
            )
            alone = reference.block_sparse_attention(q, k, v, LAYOUT, mask, tail=compensation != "none")
            wanted[b, order.q[b, h], h] = alone[0, :, 0]
    assert_rounded(out, wanted, rounding(given.q, given.k, given.v).out)
    assert density == pytest.approx(mask.density(LAYOUT))


def test_a_compensation_remembers_counts_its_pairs_and_is_left_out_where_nothing_is_skipped() -> None:
    given, memory = heads(), {}
    mine = group(HeadPolicy(WINDOW, compensation="halved_in_test"))
    plain, kept = run_heads(KERNELS["reference"], group(HeadPolicy(WINDOW)), given, {})
    for times in (1, 2, 3):
        out, density = run_heads(KERNELS["reference"], mine, given, memory)
        assert_rounded(out, plain / times, rounding(given.q, given.k, given.v).out)
        assert density == pytest.approx(kept + 0.25)
    everything = PatternSpec.make("sliding_tile", window=(1.0, 1.0, 1.0))
    assert prepare(LayerPolicy((HeadPolicy(everything, compensation="halved_in_test"),)), 3, LAYOUT) == ()


def test_skipping_takes_part_in_a_plan() -> None:
    given = heads()
    q = given.q * 4  # peaked, so that there is something to skip
    given = Heads(q, given.k, given.v, LAYOUT)
    factor = 0.05 * LAYOUT.tokens
    mine = group(HeadPolicy(skip=factor))
    assert mine.request(q).skip
    out, density = run_heads(KERNELS["reference"], mine, given, {})
    skips = Skips.of(math.log(0.05), q)
    full = BlockMask.full(LAYOUT)
    wanted = reference.block_sparse_attention(q, given.k, given.v, LAYOUT, full, skips=skips)
    assert torch.equal(out, wanted) and int(skips.skipped.sum()) > 0
    assert density == pytest.approx(1 - float(skips.skipped.double().mean()) / LAYOUT.tokens**2)


def test_heads_of_different_policies_have_groups_of_their_own() -> None:
    policies = (
        HeadPolicy(WINDOW),
        HeadPolicy(WINDOW, compensation="halved_in_test"),
        HeadPolicy(WINDOW, skip=1.0),
        HeadPolicy(WINDOW, compensation=CompensationSpec("none")),
    )
    found = prepare(LayerPolicy(policies), 4, LAYOUT)
    assert [g.members for g in found] == [(0, 3), (1,), (2,)]
    assert [g.request(heads(count=4).q).return_lse for g in found] == [False, True, False]


def test_state_is_kept_by_guidance_branch_in_a_pipeline() -> None:
    case = CASES[0]
    pipe = case.make()
    seen: dict[tuple[int, str | None], list[int]] = {}

    def noted(call: Call) -> torch.Tensor:
        out = Halved.attend(Halved(), call)
        session = vidaccel.session_of(pipe)
        assert session is not None
        site = session.sites[call.heads.layer]
        context = site.transformer.context
        assert context is not None
        seen.setdefault((call.heads.layer, context.moment.branch), []).append(call.memory["calls"])
        return out

    class Noted(Halved):
        def attend(self, call: Call) -> torch.Tensor:
            return noted(call)

    registry._REGISTRY.known[Halved.name] = Noted
    plan = Plan.uniform("test", HeadPolicy(WINDOW, compensation="halved_in_test"))
    vidaccel.patch(pipe, Plan("test", plan.rules, tile=TileShape(2, 2, 2)), strict=True)
    for _ in range(2):  # a new run starts with an empty memory
        seen.clear()
        case.run(pipe)
        assert len(seen) == 4 and all(calls == [1, 2, 3] for calls in seen.values())


def test_rules_of_other_blocks_remember_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Noted(Halved):
        def attend(self, call: Call) -> torch.Tensor:
            out = super().attend(call)
            calls.append(call.memory["calls"])
            return out

    monkeypatch.setitem(registry._REGISTRY.known, Halved.name, Noted)
    wide = PatternSpec.make("sliding_tile", window=(3, 1, 1))
    first, second = (LayerPolicy((HeadPolicy(spec, compensation="halved_in_test"),)) for spec in (WINDOW, wide))
    pipe = CASES[0].make()
    plan = Plan("test", (Rule(first, noise=(0.95, 1.0)), Rule(second)), tile=TileShape(1, 2, 2))
    session = vidaccel.patch(pipe, plan, strict=True)
    CASES[0].run(pipe)
    assert len(session.sites) == 2 and calls == [1] * 8 + [2] * 4, "a step by the first rule, two by the second"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (
            HeadPolicy(PatternSpec("svg2"), compensation="rettention"),
            "rettention keeps outputs by place, but svg2 sorts the tokens anew",
        ),
        (HeadPolicy(PatternSpec("windows")), "no pattern is called 'windows'"),
        (HeadPolicy(WINDOW, compensation="magic"), "no compensation is called 'magic'; valid are"),
        (
            HeadPolicy(WINDOW, compensation=CompensationSpec.make("pooled_tail", parts=2)),
            "compensation 'pooled_tail' has no parameter parts; its parameters are none",
        ),
    ],
)
def test_wrong_names_are_found_when_patching(policy: HeadPolicy, says: str) -> None:
    pipe: Any = CASES[0].make()
    with pytest.raises(ConfigError, match=says):
        vidaccel.patch(pipe, Plan.uniform("test", policy))
    assert vidaccel.session_of(pipe) is None
