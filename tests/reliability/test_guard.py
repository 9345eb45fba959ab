"""Bad numbers in a real pipeline: the video stays finite, the call runs dense, and the report says where and why."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

import vidaccel
from tests.reliability.nan_queries import NAN_QUERIES, nan_queries
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo.wan import CASES
from vidaccel import Guard, HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, Session, TileShape
from vidaccel.engine import attend as attend_module
from vidaccel.engine.site import AttentionSite
from vidaccel.errors import ConfigError, StrictError, VidaccelWarning

T2V = CASES[0]  # 2 layers of 3 heads, 3 steps, cond and uncond: 12 calls
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])
STEPS, LAYERS, HEADS = 3, 2, 3

PLANS = {
    "window": HeadPolicy(WINDOW),
    "tail": HeadPolicy(WINDOW, compensation="pooled_tail"),
    "int8": HeadPolicy(WINDOW, "int8"),
    "pooled": HeadPolicy(PatternSpec.make("pooled_top_k", density=0.3)),
    "stateful": HeadPolicy(WINDOW, compensation="rettention"),
    "clusters": HeadPolicy(PatternSpec("svg2")),
}

#: What happens to one head's tokens [S,D] of q, k or v, and whether every attention shows it. torch's own on a
#: CPU gives zeros for a query that is NaN, and a pattern may skip the one key that is.
DAMAGES: dict[str, tuple[Callable[[torch.Tensor, int], None], bool]] = {
    "one NaN": (lambda x, at: x[at, 0].fill_(torch.nan), False),
    "one Inf": (lambda x, at: x[at, 0].fill_(torch.inf), False),
    "all NaN": (lambda x, at: x.fill_(torch.nan), True),
    "all -Inf": (lambda x, at: x.fill_(-torch.inf), True),
    "zeros": (lambda x, at: x.zero_(), False),
    "constant": (lambda x, at: x.fill_(0.75), False),
    "huge": (lambda x, at: x.mul_(1e30), False),
    "largest": (lambda x, at: x.copy_(x.sign() * torch.finfo(x.dtype).max), False),
}

#: All for the first plan; for the others those that show.
PAIRS = [(d, n) for n in PLANS for d in DAMAGES if n == "window" or d in ("one NaN", "all NaN", "constant", "largest")]

Attend = Callable[..., torch.Tensor]


def plan(policy: HeadPolicy) -> Plan:
    return Plan("test", (Rule(LayerPolicy((policy,))),), tile=TileShape(2, 2, 2))


@cache
def pipeline() -> Any:
    """One pipeline for all tests here; each run patches and unpatches it."""
    return T2V.make()


@cache
def dense_video() -> torch.Tensor:
    """What it generates unpatched."""
    return T2V.run(T2V.make())


def generate(policy: HeadPolicy, monkeypatch: pytest.MonkeyPatch, attend: Attend | None, **options: Any) -> Any:
    """(latents, session) of a run whose attention calls go through ``attend(site, q, k, v, mask, hidden)``."""
    pipe = pipeline()
    session = vidaccel.patch(pipe, plan(policy), **options)
    try:
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore", VidaccelWarning)
            if attend is not None:
                patched.setattr(attend_module, "attend", attend)
            return T2V.run(pipe), session
    finally:
        vidaccel.unpatch(pipe)


class Injection:
    """Damages one call of a run; ``instead`` takes that call over."""

    def __init__(self, case: int, damage: str, instead: Attend | None = None) -> None:
        draw = random.Random(case)
        self.layer, self.step, self.head = draw.randrange(LAYERS), draw.randrange(STEPS), draw.randrange(HEADS)
        self.what, self.branch = draw.choice("qkv"), draw.choice(["cond", "uncond"])
        self.token, self.damage, self.instead = draw.randrange(45), DAMAGES[damage][0], instead
        self.hits = 0

    def __call__(self, site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> Any:
        context = site.transformer.context
        assert context is not None
        moment = context.moment
        if (site.layer, moment.step, moment.branch) != (self.layer, self.step, self.branch):
            return real(site, q, k, v, *more)
        self.hits += 1
        q, k, v = (x.clone() for x in (q, k, v))
        self.damage({"q": q, "k": k, "v": v}[self.what][0, :, self.head], self.token)
        return (self.instead or real)(site, q, k, v, *more)


real = attend_module.attend


def dense_fallback(site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> torch.Tensor:
    """What the unpatched layer makes of a call; of one that it cannot do, with the bad numbers taken out."""
    context = site.transformer.context
    assert context is not None
    context.run.forget(site)
    out = site.dense(q, k, v, None)
    if (out.abs() < 1e15).all():
        return out
    q, k, v = (torch.where(torch.isfinite(x), x, 0.0).clamp(-1e4, 1e4) for x in (q, k, v))
    return site.dense(q, k, v, None)


@pytest.fixture(params=NAN_QUERIES, ids=lambda give: f"NaN queries give {give or 'what they do here'}")
def processors(request: pytest.FixtureRequest) -> Iterator[None]:
    """On every kind of processor."""
    with nan_queries(request.param):
        yield


@pytest.mark.full
@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize(("damage", "name"), PAIRS)
def test_bad_numbers(damage: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = list(PLANS).index(name) * 100 + list(DAMAGES).index(damage)
    injection = Injection(case, damage)
    found, session = generate(PLANS[name], monkeypatch, injection)
    assert injection.hits == 1
    assert torch.isfinite(found).all()
    report = session.report()
    told = [event for event in report.events if event.startswith("guard: ")]
    if DAMAGES[damage][1]:
        assert told, f"{damage} in {injection.what} passed unseen"
    if not told:  # attention over such numbers is right as it is
        assert report.sparse_calls == STEPS * LAYERS * 2 and not report.fallbacks
        return
    [event] = told
    assert (
        f"in head {injection.head} of batch entry 0 at transformer layer {injection.layer}, step {injection.step}"
        in event
    )
    assert re.match(r"guard: (non-finite output|output above 1e\+15|flat output)", event) and "ran dense" in event
    [(reason, count)] = report.fallbacks.items()
    assert reason.startswith("guard: ") and count == 1
    assert report.sparse_calls == STEPS * LAYERS * 2 - 1
    expected, _ = generate(PLANS[name], monkeypatch, Injection(case, damage, dense_fallback))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("processors")
def test_dense_fallback_of_good_numbers_is_told_from_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the input at fault the report says so, and an untouched run says nothing of the guard."""
    _, clean = generate(PLANS["window"], monkeypatch, None)
    assert not [event for event in clean.report().events if "guard" in event] and not clean.report().fallbacks
    _, bad = generate(PLANS["window"], monkeypatch, Injection(3, "all NaN"))
    assert any("the input of this layer is at fault" in event for event in bad.report().events)


@pytest.mark.usefixtures("processors")
def test_a_strict_session_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    says = r"layer \d cannot run as the plan says: guard: (non-finite|flat) output in head \d"
    with pytest.raises(StrictError, match=says):
        generate(PLANS["window"], monkeypatch, Injection(3, "all NaN"), strict=True)


# -- comparison with exact attention --------------------------------------------------------------------------------


def excluded(session: Session) -> dict[int, set[int]]:
    """Layer -> the heads that ran dense because of their error."""
    layers = session.report().layers
    return {
        layer["layer"]: set(map(int, re.findall(r"head (\d+) \(", " ".join(layer["fallbacks"])))) for layer in layers
    }


@pytest.mark.parametrize("name", PLANS)
def test_heads_above_the_limit_run_dense_from_then_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of next to nothing every head falls back in the first call, and the video is the dense one."""
    found, session = generate(PLANS[name], monkeypatch, None, guard=Guard(every=1, rows=45, limit=1e-6))
    assert_rounded(found, dense_video(), bound_of_case(T2V))
    report = session.report()
    if name in ("stateful", "clusters"):  # exact in their first step, or where they keep all
        assert any(excluded(session).values())
        return
    assert all(heads == set(range(HEADS)) for heads in excluded(session).values())
    assert all(layer["sparse_calls"] == 1 for layer in report.layers)
    events = [event for event in report.events if event.startswith("guard: ")]
    assert len(events) == LAYERS * HEADS
    assert events[0].startswith("guard: head 0 of transformer layer 0 runs dense from step 0 on: its sampled relative")
    assert sum(report.fallbacks.values()) == STEPS * LAYERS * 2


def test_only_the_head_that_is_off_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong in one head of one layer, from the second step on."""

    def wrong(site: AttentionSite, *tensors: Any) -> torch.Tensor:
        context = site.transformer.context
        assert context is not None
        moment = context.moment
        with monkeypatch.context() as patched:
            if site.layer == 1 and moment.step >= 1:
                patched.setattr(attend_module, "run_heads", spoiled)
            return real(site, *tensors)

    run_heads = attend_module.run_heads

    def spoiled(kernel: Any, group: Any, heads: Any, memory: Any) -> tuple[torch.Tensor, float]:
        out, density = run_heads(kernel, group, heads, memory)
        if 2 in group.members and not (group.mask is not None and group.mask.is_full()):
            out[:, :, group.members.index(2)] *= -3
        return out, density

    full = HeadPolicy(PatternSpec.make("sliding_tile", window=[1.0, 1, 1.0]), compensation="pooled_tail")
    good, before = generate(full, monkeypatch, None, guard=Guard(every=1, rows=45, limit=2.0))
    assert not any(excluded(before).values())
    found, session = generate(full, monkeypatch, wrong, guard=Guard(every=1, rows=45, limit=2.0))
    assert excluded(session) == {0: set(), 1: {2}}
    [event] = [event for event in session.report().events if event.startswith("guard: ")]
    assert event.startswith("guard: head 2 of transformer layer 1 runs dense from step 1 on")
    first, second = session.report().layers
    assert not first["fallbacks"] and list(second["fallbacks"].values()) == [4]
    assert second["sparse_calls"] == 6  # its other heads go on
    assert (found - good).norm() < (good - dense_video()).norm()


def test_other_rows_each_time_and_every_so_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidaccel.engine import guard as guard_module

    seen: list[tuple[int, tuple[int, ...]]] = []
    exact = guard_module._exact

    def noted(heads: Any, rows: torch.Tensor | None) -> torch.Tensor:
        assert rows is not None
        seen.append((heads.layer, tuple(rows.tolist())))
        return exact(heads, rows)

    monkeypatch.setattr(guard_module, "_exact", noted)
    plain, _ = generate(PLANS["window"], monkeypatch, None)
    found, session = generate(PLANS["window"], monkeypatch, None, guard=Guard(every=2, rows=7, limit=1e6))
    assert torch.equal(found, plain)  # looking changes nothing
    assert not session.report().fallbacks
    assert [layer for layer, _ in seen] == [0, 1] * 3
    assert all(len(rows) == 7 and min(rows) >= 0 and max(rows) < 45 for _, rows in seen)
    assert len({rows for layer, rows in seen if layer == 0}) == 3


def test_padded_samples_are_compared_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of different lengths run in parts; text and padding are no query rows of the comparison."""
    from tests.zoo.hunyuan_video import CASES as HUNYUAN

    case = HUNYUAN[0]
    assert case.two is not None
    dense = case.run(case.make(), **case.two())
    pipe = case.make()
    session = vidaccel.patch(pipe, plan(HeadPolicy(WINDOW)), guard=Guard(every=1, limit=1e-6))
    found = case.run(pipe, **case.two())
    assert session.report().sparse_calls > 0
    assert any(event.startswith("guard: head") for event in session.report().events)
    apart = case.make()
    vidaccel.patch(apart, plan(HeadPolicy(WINDOW)))
    assert (found - dense).norm() < 0.7 * (case.run(apart, **case.two()) - dense).norm()


def test_strict_sessions_raise_for_a_head_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StrictError, match=r"guard: dense because their sampled error is above the limit 1e-06: head 0"):
        generate(PLANS["window"], monkeypatch, None, guard=Guard(every=1, limit=1e-6), strict=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"every": -1}, "Guard.every is -1; give a whole number of at least 0"),
        ({"every": True}, "Guard.every is True"),
        ({"rows": 0}, "Guard.rows is 0; give a whole number of at least 1"),
        ({"limit": 0}, "Guard.limit is 0; give a relative error above 0"),
        ({"limit": float("nan")}, "Guard.limit is nan"),
    ],
)
def test_numbers_out_of_range(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Guard(**given)
