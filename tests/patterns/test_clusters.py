"""SVG2 and patterns over clusters, against k-means and rules written out in loops."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import vidaccel
from tests.patterns.calls import LAYOUTS, Array, make_call, softmax
from tests.patterns.orders import attends_what_it_keeps, check_order, choose
from tests.rounding import assert_rounded, rounding
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.engine.prepare import check_plan
from vidaccel.errors import ConfigError, LayoutError
from vidaccel.kernels import kmeans
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import select
from vidaccel.layout import TokenLayout
from vidaccel.patterns import (
    Clustered,
    ErrorRouting,
    Heads,
    PooledTopK,
    Rectified,
    Reuse,
    Svg2,
    SvgEar,
    build_pattern,
    cluster_order,
)
from vidaccel.patterns.cluster_order import Sorted
from vidaccel.patterns.cluster_pairs import cover_blocks
from vidaccel.types import PRECISIONS

QUERIES, KEYS = 7, 11
PATTERN = Svg2(queries=QUERIES, keys=KEYS, first=5, later=2, mass=0.5, least=0.2)
IDS = ["no text", "text last", "text first"]


def _kmeans(x: Array, centroids: Array, iterations: int) -> tuple[list[int], Array]:
    """Lloyd's iterations: labels of the last assignment, and the means of what it put together."""
    labels: list[int] = []
    for _ in range(iterations):
        labels = np.square(x[:, None] - centroids).sum(-1).argmin(1).tolist()
        members = [[i for i, label in enumerate(labels) if label == j] for j in range(len(centroids))]
        centroids = np.stack([x[m].mean(0) if m else centroids[j] for j, m in enumerate(members)])
    return labels, centroids


def _begin(x: Array, count: int) -> Array:
    """The token in the middle of each of ``count`` equal parts."""
    return np.stack([x[(2 * i + 1) * len(x) // (2 * count)] for i in range(count)])


def _kept_clusters(q: Array, k: Array, counts: list[int], mass: float, least: float) -> list[list[bool]]:
    """By the published rule: sorted, until the mass before an item exceeds the limit, but the first ones anyway."""
    rows = []
    for c in q:
        logits = [
            float(c @ d) / np.sqrt(len(c)) + (np.log(n) if n else -np.inf) for d, n in zip(k, counts, strict=True)
        ]
        p = softmax(np.array(logits))
        held, row = 0.0, [False] * len(k)
        for place, j in enumerate(sorted(range(len(k)), key=lambda j: -p[j])):
            row[j] = held <= mass or place < int(least * len(k))
            held += p[j]
        rows.append(row)
    return rows


class Oracle:
    """Clusters of every sample and head, from call to call."""

    def __init__(self) -> None:
        self.before: dict[tuple[int, int, str], Array] = {}

    def __call__(self, call: Heads, pattern: Svg2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Labels of the video's queries and keys, int64 [B,H,V], and kept pairs of its tokens, bool [B,H,V,V]."""
        layout = call.layout
        video = layout.video_tokens
        found: list[list[Any]] = [[], [], []]
        for b in range(call.q.shape[0]):
            for h in range(call.q.shape[2]):
                labels, centres = {}, {}
                for side, x, count in (("q", call.q, QUERIES), ("k", call.k, KEYS)):
                    tokens = x[b, video, h].numpy()
                    past = self.before.get((b, h, side))
                    begin, turns = (_begin(tokens, count), pattern.first) if past is None else (past, pattern.later)
                    labels[side], centres[side] = _kmeans(tokens, begin, turns)
                    self.before[b, h, side] = centres[side]
                counts = [labels["k"].count(j) for j in range(KEYS)]
                pairs = np.array(_kept_clusters(centres["q"], centres["k"], counts, pattern.mass, pattern.least))
                found[0].append(labels["q"])
                found[1].append(labels["k"])
                found[2].append(pairs[np.ix_(labels["q"], labels["k"])])
        shape = (call.q.shape[0], call.q.shape[2])
        q, k, pairs = (torch.from_numpy(np.array(x)) for x in found)
        return q.unflatten(0, shape), k.unflatten(0, shape), pairs.unflatten(0, shape)


def _rounded_out(layout: TokenLayout, order: torch.Tensor, keys: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """One head: all token pairs of the blocks that hold a kept one, in layout order, text with everything."""
    kept = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    start = layout.video_start
    sizes = layout.block_sizes[layout.video_blocks].tolist()
    video = slice(start, start + layout.grid.tokens)
    rows, columns = ((x[video] - start).split(sizes) for x in (order, keys))
    for i in rows:
        for j in columns:
            kept[(i + start)[:, None], j + start] = bool(pairs[i][:, j].any())
    return kept


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
@pytest.mark.parametrize("lined_up", [True, False])
def test_it_is_its_formula_from_step_to_step(layout: TokenLayout, lined_up: bool) -> None:
    pattern = replace(PATTERN, lined_up=lined_up)
    oracle, memory = Oracle(), dict[str, Any]()
    for seed in range(2):  # the second step begins with the centroids of the first
        call = replace(make_call(layout, seed=seed), memory=memory)
        assert not call.q.is_contiguous()
        order, blocks = choose(pattern, call)
        check_order(order, layout)
        queries, keys, pairs = oracle(call, pattern)
        video = layout.video_tokens
        for b in range(2):
            for h in range(3):
                for index, labels in ((order.q[b, h], queries[b, h]), (order.k[b, h], keys[b, h])):
                    runs = labels[index[video] - layout.video_start].unique_consecutive()
                    assert len(runs) == len(runs.unique()), "each cluster stands together"
                wanted = _rounded_out(layout, order.q[b, h], order.k[b, h], pairs[b, h])
                of = layout.block_of_token
                found = torch.empty_like(wanted)
                found[order.q[b, h][:, None], order.k[b, h]] = blocks[b, h][of][:, of]
                assert torch.equal(found, wanted)
        assert not blocks.all()
        assert not torch.equal(blocks[0], blocks[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_the_kernel_attends_at_least_the_kept_clusters(layout: TokenLayout) -> None:
    call = make_call(layout)
    _, _, pairs = Oracle()(call, PATTERN)
    order, _ = choose(PATTERN, replace(call, memory={}))
    kept = torch.stack(
        [
            torch.stack([_rounded_out(layout, order.q[b, h], order.k[b, h], pairs[b, h]) for h in range(3)])
            for b in range(2)
        ]
    )
    video = layout.video_tokens
    assert bool((kept[:, :, video, video] | ~pairs).all())
    attends_what_it_keeps(PATTERN, call, kept)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_exact_blocks_are_the_kept_clusters_and_nothing_else(layout: TokenLayout) -> None:
    """The published system: a softmax over the tokens of kept clusters, from step to step; text with everything."""
    pattern, oracle, memory = replace(PATTERN, exact=True), Oracle(), dict[str, Any]()
    video = layout.video_tokens
    for seed in range(2):
        call = replace(make_call(layout, seed=seed), memory=memory)
        _, _, pairs = oracle(call, pattern)
        kept = torch.ones(2, 3, layout.tokens, layout.tokens, dtype=torch.bool)
        kept[:, :, video, video] = pairs
        order = pattern.order(call)
        moved = call.reordered(order)
        mask = pattern.mask(moved)
        assert mask.density(layout) == pytest.approx(float(kept.double().mean())) and not kept.all()
        kernel = select(KernelRequest.of(call.q.float(), PRECISIONS["native"], variable=True))
        q, k, v = (x.float() for x in (moved.q, moved.k, moved.v))
        found = order.restore(kernel(q, k, v, layout, mask, scale=call.scale))
        rows = (x.transpose(1, 2).double() for x in (call.q, call.k, call.v))
        wanted = scaled_dot_product_attention(*rows, attn_mask=kept, scale=call.scale).transpose(1, 2)
        assert_rounded(found, wanted, rounding(q, k, v, call.scale).out)


def test_exact_blocks_go_with_what_can_compute_them() -> None:
    spec = PatternSpec.make("svg2", exact=True)
    for policy in (
        HeadPolicy(spec, precision="int8"),
        HeadPolicy(spec, skip=0.1),
        HeadPolicy(spec, compensation=CompensationSpec("delta")),
    ):
        with pytest.raises(ConfigError, match="set exact: false for blocks of one size"):
            check_plan(Plan("test", (Rule(LayerPolicy((policy,))),)))
        check_plan(Plan("test", (Rule(LayerPolicy((replace(policy, pattern=PatternSpec("svg2")),))),)))
    for name in ("none", "pooled_tail"):
        check_plan(Plan("test", (Rule(LayerPolicy((HeadPolicy(spec, compensation=CompensationSpec(name)),))),)))


def test_exact_blocks_in_a_pipeline() -> None:
    """Every family's text and both guidance branches are in the zoo's first case; fewer pairs than in whole blocks."""
    density = {}
    for exact in (True, False):
        pipe = CASES[0].make()
        spec = PatternSpec.make("svg2", queries=4, keys=6, first=3, mass=0.3, exact=exact)
        policy = HeadPolicy(spec, compensation=CompensationSpec("pooled_tail"))
        plan = Plan("test", (Rule(LayerPolicy((policy,))),), tile=TileShape(1, 1, 2))
        session = vidaccel.patch(pipe, plan, strict=True)
        assert bool(CASES[0].run(pipe).isfinite().all())
        density[exact] = session.report().sparse_density
    assert density[True] is not None and density[False] is not None and density[True] < density[False]


def test_samples_and_heads_are_on_their_own() -> None:
    call = make_call(LAYOUTS[1])
    order, blocks = choose(PATTERN, call)
    heads = torch.tensor([2, 0, 1])
    moved = replace(call, q=call.q[:1, :, heads], k=call.k[:1, :, heads], v=call.v[:1, :, heads], memory={})
    again, same = choose(PATTERN, moved)
    assert torch.equal(same, blocks[:1, heads]) and torch.equal(again.q, order.q[:1, heads])


def test_memory_starts_anew_for_another_number_of_samples() -> None:
    memory: dict[str, Any] = {}
    choose(PATTERN, replace(make_call(LAYOUTS[0]), memory=memory))
    alone = replace(make_call(LAYOUTS[0], batch=1, seed=4), memory=memory)
    fresh = replace(alone, memory={})
    assert torch.equal(choose(PATTERN, alone)[1], choose(PATTERN, fresh)[1])
    assert set(memory) == {"q", "k"}, "only centroids stay from step to step"


def test_cover_is_every_block_with_a_kept_pair_of_tokens() -> None:
    """Random clusters, empty ones among them, and random kept pairs."""
    generator = torch.Generator().manual_seed(3)
    layout = LAYOUTS[2]
    sizes = layout.block_sizes[layout.video_blocks].tolist()
    for _ in range(20):
        labels = [torch.randint(0, n, (layout.grid.tokens,), generator=generator).sort().values for n in (9, 40)]
        labels[1][labels[1] == 5] = 6
        kept = torch.rand(9, 40, generator=generator) < 0.01
        sides = [
            Sorted(torch.empty(0), x.bincount(minlength=n)[None, None]) for x, n in zip(labels, (9, 40), strict=True)
        ]
        found = cover_blocks(kept[None, None], *sides, layout)[0, 0]
        for i, rows in enumerate(labels[0].split(sizes)):
            for j, columns in enumerate(labels[1].split(sizes)):
                assert bool(found[i, j]) == bool(kept[rows][:, columns].any())


def test_clustered_shows_the_inner_pattern_sorted_heads() -> None:
    layout = LAYOUTS[1]
    call = make_call(layout)
    for inner in (PooledTopK(aim=0.3), ErrorRouting(aim=0.3)):
        pattern = Clustered(queries=QUERIES, keys=KEYS, first=5, pattern=inner)
        order = pattern.order(call)
        check_order(order, layout)
        moved = call.reordered(order)
        assert torch.equal(pattern.choose(moved), inner.choose(replace(moved, memory={})))
        assert pattern.density(layout) == inner.density(layout)
        assert moved.v[1, 20, 2].equal(call.v[1, order.k[1, 2, 20], 2])


def test_lining_up_lowers_what_rounding_adds() -> None:
    """Queries and keys on a line: neighbours there are neighbours among clusters, so blocks hold like with like."""
    generator = torch.Generator().manual_seed(0)
    layout = LAYOUTS[0]
    line = torch.randn(2, 1, layout.tokens, 2, 1, generator=generator, dtype=torch.float64)
    direction = torch.randn(8, generator=generator, dtype=torch.float64)
    q, k = 4 * line * direction
    call = Heads(q, k, q, layout)
    kept = {
        lined_up: float(
            choose(Svg2(queries=24, keys=48, lined_up=lined_up), replace(call, memory={}))[1].double().mean()
        )
        for lined_up in (True, False)
    }
    assert kept[True] < 0.8 * kept[False]


def test_guidance_branches_and_layers_have_centroids_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int, bool]] = []
    order = Svg2.order

    def watched(self: Svg2, heads: Heads) -> Any:
        found.append((heads.step, id(heads.memory), "q" in heads.memory))
        return order(self, heads)

    monkeypatch.setattr(Svg2, "order", watched)
    pipe = CASES[0].make()
    spec = PatternSpec.make("svg2", queries=4, keys=6, first=3, mass=0.3)
    policy = HeadPolicy(spec, compensation=CompensationSpec("pooled_tail"))
    session = vidaccel.patch(pipe, Plan("test", (Rule(LayerPolicy((policy,))),), tile=TileShape(1, 1, 2)), strict=True)
    first = CASES[0].run(pipe)
    steps = len(found)
    assert torch.equal(CASES[0].run(pipe), first), "a new run begins with nothing remembered"
    assert bool(first.isfinite().all()) and session.report().sparse_calls == session.report().calls == len(found)
    for run in (found[:steps], found[steps:]):
        for step in range(3):  # two layers and two branches
            assert len({memory for at, memory, _ in run if at == step}) == 4
        assert [warm for _, _, warm in run] == [False] * 4 + [True] * 8
    density = session.report().density
    assert density is not None and density < 1


def test_where_kernels_can_run_they_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not here: the door says yes, and a stand-in for the kernels notes how it is called."""
    asked: list[tuple[int | tuple[int, ...], int]] = []

    def cluster(x: torch.Tensor, centroids: torch.Tensor | int, iterations: int) -> kmeans.Clusters:
        asked.append((centroids if isinstance(centroids, int) else tuple(centroids.shape), iterations))
        return kmeans.cluster(x, centroids, iterations)

    means = Mock(side_effect=kmeans.means)
    module = ModuleType("vidaccel.kernels.triton.kmeans")
    module.cluster, module.means = cluster, means  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cluster_order.triton_kernels, "why_not", lambda request: None)
    call = make_call(LAYOUTS[0])
    for _ in range(2):
        choose(PATTERN, call)
    assert asked == [(QUERIES, 5), (KEYS, 5), ((2, 3, QUERIES, 16), 2), ((2, 3, KEYS, 16), 2)]
    assert not means.called
    choose(SvgEar(queries=QUERIES, keys=KEYS, aim=0.3), replace(call, memory={}))
    assert means.call_count == 1, "the means of the values"


def test_blocks_need_an_order_first() -> None:
    with pytest.raises(LayoutError, match=r"call order\(\) on the same heads first"):
        PATTERN.choose(make_call(LAYOUTS[0]))


def test_words_and_mistakes() -> None:
    layout = LAYOUTS[0]
    assert "7 query and 11 key clusters, 0.5 of the attention" in PATTERN.resolved(layout)
    assert "rounded out to 18 blocks" in PATTERN.resolved(layout)
    assert "as blocks of their own" in replace(PATTERN, exact=True).resolved(layout)
    assert PATTERN.density(layout) is None
    assert "1 query and 32 key clusters" in Svg2(queries=0.004, keys=0.1).resolved(layout)
    ear = build_pattern(
        PatternSpec.from_data({"name": "clustered", "pattern": {"name": "error_routing", "density": 0.25}})
    )
    assert "tokens sorted by 18 query and 18 key clusters, error_routing (5 of 18" in ear.resolved(layout)
    for make, message in (
        (lambda: Svg2(queries=0), "queries is 0"),
        (lambda: Svg2(keys=1.5), "keys is 1.5"),
        (lambda: Svg2(mass=0.0), "mass is 0.0"),
        (lambda: Svg2(least=-0.1), "least is -0.1"),
        (lambda: Svg2(first=0), "first is 0"),
        (lambda: Svg2(exact=1), "exact is 1"),  # type: ignore[arg-type]
        (lambda: Svg2(lined_up=1), "lined_up is 1"),  # type: ignore[arg-type]
        (lambda: Clustered(pattern=Rectified()), "goes by queries and keys alone"),
        (lambda: Clustered(pattern=Reuse(pattern=PooledTopK(aim=0.2))), "goes by queries and keys alone"),
        (lambda: Clustered(pattern=PATTERN), "goes by queries and keys alone"),
        (lambda: Reuse(pattern=PATTERN), "has an order of its own or remembers"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
