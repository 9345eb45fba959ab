"""Context parallelism: two processes that share each sequence give what one gives, each head by a policy of its own.

The two run once, on gloo; what they found is compared with the same scenes in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vidaccel
from tests.reliability.ranks import HEADS, SCENES, WORLD, plan, wan
from tests.rounding import assert_rounded, bound_of
from tests.zoo import cogvideox, hunyuan_video
from tests.zoo.case import Case
from vidaccel import HeadPolicy, LayerPolicy, PatchError, StrictError
from vidaccel.configs.presets import load_preset, preset_names
from vidaccel.engine import host
from vidaccel.engine.attend import attend
from vidaccel.engine.parallel import Ranks, ranks_of
from vidaccel.engine.prepare import HeadShare

pytestmark = pytest.mark.full

GRID = (5, 7, 9)
SAME = (
    "heads",
    "heads, split before",
    "heads, below half the noise dense",
    "memories",
    "gates",
    "a timestep for each token",
    "any length",
    "ring",
    "ltx",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two found, by scene."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.reliability.ranks", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*SAME, "sampled guard"])
def test_two_ranks_give_what_one_gives(ranks: list[dict[str, Any]], name: str) -> None:
    one = SCENES[name](False)
    assert one["error"] is None and one["report"]["sparse_calls"] > 0
    allowed = bound_of(lambda: SCENES[name](False)["out"], one["out"])  # another order of sums is all that differs
    for found in (rank[name] for rank in ranks):
        assert found["error"] is None, found["error"]
        assert_rounded(found["out"], one["out"], allowed)
        assert found["report"]["calls"] == one["report"]["calls"]
        assert name == "sampled guard" or not found["report"]["fallbacks"]
        if "unpatched" in found:
            assert_rounded(found["unpatched"], one["unpatched"], allowed)


def test_a_report_is_of_the_heads_of_its_rank(ranks: list[dict[str, Any]]) -> None:
    one = SCENES["heads"](False)["report"]
    first, second = (rank["heads"]["report"] for rank in ranks)
    assert first["density"] != pytest.approx(second["density"])  # windows and top-k there, plain and wide here
    assert (first["density"] + second["density"]) / 2 == pytest.approx(one["density"], abs=1e-9)
    assert any("2 ranks exchange their tokens for heads" in event for event in first["events"])
    assert any("as ring_degree asks, in dense ones only" in event for event in ranks[0]["ring"]["report"]["events"])


def test_dense_plans_are_diffusers_own_bit_by_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["dense"]["out"], rank["unpatched"]["out"])
        assert rank["dense"]["report"]["density"] == 1.0
    mixed = ranks[0]["heads, below half the noise dense"]
    assert torch.equal(mixed["unpatched"], ranks[0]["unpatched"]["out"][:2])
    assert torch.equal(mixed["out"][4:], ranks[0]["unpatched"]["out"][4:])  # the steps that the plan wants dense
    assert not torch.equal(mixed["out"][:2], ranks[0]["unpatched"]["out"][:2])


def test_the_guard_names_heads_by_their_number_in_the_layer(ranks: list[dict[str, Any]]) -> None:
    clean, hit = (rank["guard"] for rank in ranks)
    assert clean["report"]["fallbacks"] == {}
    assert list(hit["report"]["fallbacks"]) == ["guard: non-finite output in head 3 of batch entry 0"]
    assert torch.equal(clean["out"], hit["out"]) and clean["out"].isfinite().all()
    first, second = (" ".join(rank["sampled guard"]["report"]["fallbacks"]) for rank in ranks)
    assert "head 0 (" in first and "head 1 (" in first and "head 3 (" not in first
    assert "head 3 (" in second and "head 0 (" not in second


def test_heads_that_cannot_be_split_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "3 heads cannot be split over ulysses_degree=2; give a degree" in rank["three heads"]["error"]


def test_shares_of_heads() -> None:
    def shares(heads: int, count: int, ulysses: int, uneven: bool = False) -> list[tuple[int, int]]:
        return [(share.first, share.count) for share in Ranks(None, 0, count, ulysses, uneven).shares(heads)]

    assert shares(12, 4, 4) == [(0, 3), (3, 3), (6, 3), (9, 3)]
    assert shares(5, 3, 3, uneven=True) == [(0, 2), (2, 2), (4, 1)]
    assert shares(5, 2, 1) == [(0, 3), (3, 2)]  # a ring does not care
    assert shares(6, 4, 2) == [(0, 2), (2, 2), (4, 1), (5, 1)]  # a ring of two pairs
    with pytest.raises(PatchError, match="2 heads cannot be split over 3 ranks"):
        shares(2, 3, 1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (SimpleNamespace(context_parallel_config=None, tensor_parallel_config=object()), "splits something else than"),
        (SimpleNamespace(anything="else"), "splits something else than tokens; use context parallelism"),
        (SimpleNamespace(context_parallel_config=SimpleNamespace()), "no mesh of ranks in a form known here"),
    ],
)
def test_what_is_not_known_runs_dense_with_the_reason(config: Any, says: str, strict: bool) -> None:
    found = ranks_of(config)
    assert isinstance(found, str) and says in found
    model = wan()
    session = vidaccel.patch(model, "sta", strict=strict)
    model._parallel_config = config
    inputs = {"hidden_states": torch.randn(1, 16, 3, 8, 8), "encoder_hidden_states": torch.randn(1, 4, 32)}
    if strict:
        with pytest.raises(StrictError, match=says), torch.no_grad():
            model(**inputs, timestep=torch.tensor([500]))
        return
    with torch.no_grad():
        model(**inputs, timestep=torch.tensor([500]))
    assert list(session.report().fallbacks) == [found]


@pytest.mark.parametrize(
    ("case", "says"),
    [(cogvideox.CASES[0], "the order of the others is unknown"), (hunyuan_video.CASES[0], "the mask is not exchanged")],
    ids=str,
)
def test_text_in_the_video_attention_runs_dense_with_the_reason(
    case: Case, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model of diffusers splits such a sequence by itself; a user can tell it how."""
    monkeypatch.setattr("vidaccel.patchers.patching.ranks_of", lambda parallel: Ranks(None, 0, 1, 1, False))
    pipe = case.make()
    plain = case.run(pipe)
    session = vidaccel.patch(pipe, plan(HEADS[:1]))
    pipe.transformer._parallel_config = object()
    assert torch.equal(case.run(pipe), plain)
    report = session.report()
    assert report.sparse_calls == 0 and sum(report.fallbacks.values()) == report.calls > 0
    assert all(says in reason for reason in report.fallbacks)


#: The sum of a softmax's 321 products with values of at most 1, in float32 and any order.
ROUNDING = 321 * torch.finfo(torch.float32).eps


def policies(preset: str) -> list[HeadPolicy]:
    return [head for rule in load_preset(preset).rules for head in rule.policy.heads]


def low_precision(preset: str) -> bool:
    return any(head.precision != "native" for head in policies(preset))


def native(preset: str, calls: list[list[torch.Tensor]]) -> torch.Tensor:
    """What the preset gives in the inputs' own precision."""
    plan = load_preset(preset)
    rules = [
        replace(rule, policy=LayerPolicy(tuple(replace(head, precision="native") for head in rule.policy.heads)))
        for rule in plan.rules
    ]
    attention = vidaccel.Attention(replace(plan, rules=tuple(rules)))
    levels = zip(calls, (0.6, 0.4), strict=True)
    return torch.stack([attention(*call, grid=GRID, noise_level=level, layer=1) for call, level in levels])


@pytest.mark.parametrize(
    "preset",
    # one follows the outputs of a whole model, the other needs trained gates
    [name for name in preset_names() if name not in ("pasa", "seer")],
)
def test_every_preset_computes_each_head_by_itself(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a rank could not compute some heads without the others."""
    calls = [[torch.randn(2, 5 * 7 * 9 + 6, 4, 16) for _ in range(3)] for _ in range(2)]

    def run(share: HeadShare | None) -> torch.Tensor:
        attention = vidaccel.Attention(preset)
        monkeypatch.setattr(host, "attend", partial(attend, share=share))
        cut = slice(None) if share is None else slice(share.first, share.first + share.count)
        levels = zip(calls, (0.6, 0.4), strict=True)
        outs = [attention(*(x[:, :, cut] for x in c), grid=GRID, noise_level=n, layer=1) for c, n in levels]
        return torch.stack(outs)

    parts, whole = torch.cat([run(HeadShare(0, 1, 4)), run(HeadShare(1, 3, 4))], dim=3), run(None)
    near = (parts - whole).abs().amax(-1) <= ROUNDING * max(float(v.abs().max()) for _, _, v in calls)
    if not low_precision(preset):
        assert near.all()
        return
    # A number between two steps of a format falls on either side, by the order in which a mean was summed. That moves
    # a few rows, by less than the format itself does
    assert near.float().mean() > 0.99
    monkeypatch.setattr(host, "attend", attend)
    assert (parts - whole).abs().max() <= (whole - native(preset, calls)).abs().max()
