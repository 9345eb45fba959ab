"""SVG-EAR on clusters: the estimate and the choice written out in loops, and the sums over ragged groups."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.patterns.calls import LAYOUTS, Array, make_call
from vidaccel import PatternSpec
from vidaccel.errors import ConfigError
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import select
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Clustered, ErrorRouting, Heads, SvgEar, build_pattern, spread
from vidaccel.patterns.spread import Groups
from vidaccel.types import PRECISIONS
from vidaccel.variablemask import VariableBlockMask

PATTERN = SvgEar(queries=7, keys=11, first=5, later=2, aim=0.3, exact=True)
IDS = ["no text", "text last", "text first"]


def _groups(x: Array, counts: list[int]) -> list[Array]:
    return [x[a:b] for a, b in pairwise(np.cumsum([0, *counts]))]


def _kept(q: Array, k: Array, v: Array, counts: tuple[list[int], list[int]], density: float) -> list[list[bool]]:
    """One head, tokens [V,D] in the order of clusters: each query cluster's key clusters by loops over tokens."""
    scale, rows = 1 / math.sqrt(q.shape[1]), []
    keys, values = _groups(k, counts[1]), _groups(v, counts[1])
    for queries in _groups(q, counts[0]):
        worth = {}
        for j, (key, value) in enumerate(zip(keys, values, strict=True)):
            if not len(key) or not len(queries):
                continue
            mass = len(key) * math.exp(scale * float(queries.mean(0) @ key.mean(0)))
            logits = scale * (key - key.mean(0)) @ queries.T
            missed = logits.T @ (value - value.mean(0)) / len(key)
            error = math.sqrt(float(np.mean([m @ m for m in missed])))
            worth[j] = mass * math.exp(min(float(np.mean(logits**2)) / 2, 2.0)) * error / len(key)
        row, held = [False] * len(keys), 0.0
        for place, j in enumerate(sorted(worth, key=lambda j: -worth[j])):
            # what the row holds is to come as near to the budget as whole clusters allow
            row[j] = place == 0 or held + len(keys[j]) / 2 <= density * len(k)
            held += len(keys[j])
        rows.append(row)
    return rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_it_is_its_formula_from_step_to_step(layout: TokenLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_AT_A_TIME", 1 << 13)  # some heads at a time
    monkeypatch.setattr(spread, "_RUN", 8)  # clusters of several runs
    video = layout.video_tokens
    memory = dict[str, Any]()
    for seed in range(2):
        call = replace(make_call(layout, seed=seed), memory=memory)
        moved = call.reordered(PATTERN.order(call))
        sides = memory["sorted"]
        mask = PATTERN.mask(moved)
        assert isinstance(mask, VariableBlockMask)
        found = mask.pairs()
        wanted = torch.ones_like(found)
        for b in range(2):
            for h in range(3):
                q, k, v = (x[b, video, h].numpy() for x in (moved.q, moved.k, moved.v))
                queries, keys = (side.counts[b, h].tolist() for side in sides)
                kept = torch.tensor(_kept(q, k, v, (queries, keys), PATTERN.aim))
                wanted[b, h, video, video] = kept.repeat_interleave(torch.tensor(queries), 0).repeat_interleave(
                    torch.tensor(keys), 1
                )
        assert torch.equal(found, wanted)
        if not layout.num_text_blocks:
            assert mask.density(layout) == pytest.approx(PATTERN.aim, abs=0.03)


def test_clusters_beat_tiles_and_runs_where_tokens_come_in_kinds() -> None:
    """Five kinds of keys and values, scattered over the video: each is nearly its mean, which no tile's mean is."""
    layout, generator = LAYOUTS[0], torch.Generator().manual_seed(0)
    kinds = torch.randn(5, 3, 16, generator=generator) * 2
    of = torch.randint(5, (1, layout.tokens), generator=generator)

    def tokens(spread: float) -> torch.Tensor:
        return kinds[of] + spread * torch.randn(1, layout.tokens, 3, 16, generator=generator)

    call = Heads(tokens(0.3), tokens(0.3), tokens(0.3), layout)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (call.q, call.k, call.v))).transpose(1, 2)
    errors = {}
    for pattern in (
        SvgEar(aim=0.2, first=10, exact=True),
        Clustered(pattern=ErrorRouting(aim=0.2), first=10),
        ErrorRouting(aim=0.2),
    ):
        order = pattern.order(call)
        moved = call if order is None else call.reordered(order)
        mask = pattern.mask(moved)
        kernel = select(KernelRequest.of(call.q, PRECISIONS["native"], tail=True, variable=pattern.variable))
        out = kernel(moved.q, moved.k, moved.v, layout, mask, tail=True)
        out = out if order is None else order.restore(out)
        errors[pattern.name] = float((out - dense).norm() / dense.norm())
        assert mask.density(layout) == pytest.approx(0.2, abs=0.05)
    assert errors["svg_ear"] < errors["clustered"] / 2 < errors["error_routing"] / 2


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 31, 64, 65, 200]), min_size=1, max_size=7).filter(lambda x: sum(x) > 0),
    start=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_sums_over_groups_of_any_size(sizes: list[int], start: int, seed: int) -> None:
    """Covariances of two heads whose groups differ, with tokens before and behind them that belong to none."""
    generator = torch.Generator().manual_seed(seed)
    of_heads = [sizes, sizes[::-1]]
    x = torch.randn(2, start + sum(sizes) + 3, 4, generator=generator)
    parts = [head[start : start + sum(sizes)].split(own) for head, own in zip(x, of_heads, strict=True)]
    means = torch.stack([torch.stack([p.mean(0) if len(p) else torch.zeros(4) for p in head]) for head in parts])
    groups = Groups.sized(torch.tensor(of_heads), slice(start, start + sum(sizes)))
    listed = groups.listed(x, means, torch.float32)
    found = groups.summed(listed.mT @ listed)
    assert found.shape == (2, len(sizes), 4, 4)
    for n, head in enumerate(parts):
        for j, part in enumerate(head):
            wanted = torch.cov(part.double().T, correction=0) if len(part) else torch.zeros(4, 4).double()
            torch.testing.assert_close(found[n, j].double(), wanted.view(4, 4), atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(target=st.lists(st.integers(0, 6), max_size=20), wide=st.booleans())
def test_sums_off_the_cpu_are_those_on_it(target: list[int], wide: bool) -> None:
    """The way of other devices, run here: the operator is the same there."""
    rows = torch.randint(-9, 9, (len(target), 3)).to(torch.float32 if wide else torch.bfloat16)  # exact in any order
    where = torch.tensor(sorted(target), dtype=torch.int64)
    with mock.patch.object(spread, "_ADDS_IN_ORDER", ()):
        other = spread._sums(rows, where, 8)
    assert torch.equal(other, spread._sums(rows, where, 8))
    assert torch.equal(other.sum(0), rows.float().sum(0))


@pytest.mark.parametrize("in_order", [("cpu",), ()])
def test_a_cluster_of_very_many_runs_in_sixteen_bits(in_order: tuple[str, ...]) -> None:
    """As much is added to the thousandth run as to the first."""
    rows = torch.ones(5000, 2, dtype=torch.bfloat16)
    with mock.patch.object(spread, "_ADDS_IN_ORDER", in_order):
        assert torch.equal(spread._sums(rows, torch.zeros(5000, dtype=torch.int64), 1), torch.full((1, 2), 5000.0))


def test_a_cluster_without_tokens_is_nobodys_only_one() -> None:
    """Where no means err, all clusters are worth the same, and a row keeps one that holds something."""
    layout = LAYOUTS[0]
    far = torch.ones(1, 2, 3, 16)
    far[:, :, 0] = 100.0
    heads = Heads(*(torch.ones(1, layout.tokens, 2, 16) for _ in range(3)), layout, {"q": far, "k": far})
    pattern = SvgEar(queries=3, keys=3, later=1, aim=0.01, lined_up=False, exact=True)
    mask = pattern.mask(heads.reordered(pattern.order(heads)))
    assert isinstance(mask, VariableBlockMask)
    assert mask.kv_sizes[0, 0].tolist() == [0, layout.tokens, 0] and mask.density(layout) == 1.0


def test_without_exact_blocks_are_rounded_out_and_promise_no_density() -> None:
    layout = LAYOUTS[1]
    call, memory = make_call(layout), dict[str, Any]()
    kept = []
    for exact in (True, False):
        pattern = replace(PATTERN, exact=exact)
        heads = replace(call, memory=dict(memory))
        mask = pattern.mask(heads.reordered(pattern.order(heads)))
        kept.append(mask.density(layout))
        assert pattern.density(layout) == (0.3 if exact else None)
        assert pattern.variable == exact
    assert kept[0] < kept[1]


def test_settings() -> None:
    spec = PatternSpec.from_data({"name": "svg_ear", "density": 0.25, "keys": 0.0313, "exact": True})
    pattern = build_pattern(spec)
    described = pattern.describe(TokenLayout.of(LAYOUTS[0].grid))
    assert "key clusters, 25.0% of the tokens for each, as blocks of their own" in described
    with pytest.raises(ConfigError, match="density"):
        SvgEar(aim=0.0)
