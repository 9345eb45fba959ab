"""Plans: which rule decides, what is dense, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.configs.strategies import plans
from vidaccel.configs.codec import plan_from_data, plan_to_data
from vidaccel.configs.pattern_spec import CompensationSpec, PatternSpec
from vidaccel.configs.plan import BRANCHES, TRANSFORMERS, HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.errors import ConfigError, LayoutError
from vidaccel.types import TileShape

DENSE = LayerPolicy()
STA = HeadPolicy(PatternSpec.make("sliding_tile", window=(3, 3, 3)))
SPARSE = LayerPolicy((STA,))
OTHER = LayerPolicy((HeadPolicy(PatternSpec("radial")),))


def test_first_match_decides_and_nothing_is_dense() -> None:
    plan = Plan(
        "p",
        (
            Rule(DENSE, noise=(0.9, 1.0)),
            Rule(OTHER, layers=(3, 1), branch="uncond"),
            Rule(SPARSE, transformer="transformer"),
        ),
    )
    assert plan.lookup(0.95, "transformer", 1, "uncond") == DENSE
    assert plan.lookup(0.5, "transformer", 1, "uncond") == OTHER
    assert plan.lookup(0.5, "transformer", 2, "uncond") == SPARSE
    assert plan.lookup(0.5, "transformer", 1, "cond") == SPARSE
    assert plan.lookup(0.5, "transformer", 1, None) == SPARSE  # a batch of both branches is not "uncond"
    assert plan.lookup(0.5, "transformer_2", 3, "uncond") == OTHER
    assert plan.lookup(0.5, "transformer_2", 0, "uncond").is_dense
    assert Plan.dense().lookup(0.5, "transformer", 0, None).is_dense


@pytest.mark.parametrize(
    ("level", "inside"),
    [(0.4, False), (0.4000001, True), (0.6, True), (0.6000001, False), (0.0, False), (1.0, False)],
)
def test_noise_is_open_below_and_closed_above(level: float, inside: bool) -> None:
    plan = Plan("p", (Rule(SPARSE, noise=(0.4, 0.6)),))
    assert plan.lookup(level, "transformer", 0, None).is_dense is not inside


def test_noise_ends() -> None:
    plan = Plan("p", (Rule(OTHER, noise=(0.0, 0.2)), Rule(SPARSE, noise=(0.2, 1.0))))
    assert plan.lookup(0.0, "transformer", 0, None) == OTHER
    assert plan.lookup(-1e-6, "transformer", 0, None) == OTHER
    assert plan.lookup(1.0 + 1e-6, "transformer", 0, None) == SPARSE
    for level in (1.02, 945.0, -0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="not a raw timestep"):
            plan.lookup(level, "transformer", 0, None)


@given(plans, st.floats(0, 1), st.sampled_from(TRANSFORMERS), st.integers(0, 5), st.sampled_from((*BRANCHES, None)))
def test_lookup_is_constant_in_a_noise_bin(
    plan: Plan, level: float, transformer: str, layer: int, branch: str | None
) -> None:
    edges, number = plan.noise_edges(), plan.noise_bin(level)
    assert edges[0] == 0.0
    assert edges[-1] == 1.0
    assert edges[number] < level <= edges[number + 1] or level == number == 0
    assert plan.lookup(level, transformer, layer, branch) == plan.lookup(edges[number + 1], transformer, layer, branch)


@given(plans, st.floats(0, 1), st.sampled_from(TRANSFORMERS), st.integers(0, 5), st.sampled_from((*BRANCHES, None)))
def test_a_dense_plan_is_dense_everywhere(
    plan: Plan, level: float, transformer: str, layer: int, branch: str | None
) -> None:
    if plan.is_dense:
        assert plan.lookup(level, transformer, layer, branch).is_dense
    guarded = Plan(plan.name, (Rule(DENSE), *plan.rules))
    assert guarded.is_dense
    assert hash(plan) == hash(replace(plan))


def test_what_is_dense() -> None:
    assert Plan.dense().is_dense
    assert not Plan.uniform("sta", STA).is_dense
    assert not Plan("p", (Rule(DENSE, noise=(0.5, 1.0)), Rule(SPARSE))).is_dense
    assert not HeadPolicy(precision="int8").is_dense  # full attention, but not the model's own
    assert not LayerPolicy((HeadPolicy(), STA)).is_dense
    assert LayerPolicy((STA, STA)).is_uniform
    assert not LayerPolicy((HeadPolicy(), STA)).is_uniform


def test_heads() -> None:
    assert SPARSE.for_head(7, 8) == STA
    pair = LayerPolicy((HeadPolicy(), STA))
    assert [pair.for_head(i, 2) for i in range(2)] == [HeadPolicy(), STA]
    with pytest.raises(ConfigError, match="2 head entries, but the layer has 12 heads; give 1 entry"):
        pair.check_heads(12)
    with pytest.raises(ConfigError, match="head 8 does not exist"):
        SPARSE.for_head(8, 8)


def test_rules_are_normalised() -> None:
    rule = Rule(SPARSE, noise=[0, 1], layers=[3, 1, 3])
    assert rule == Rule(SPARSE, noise=(-0.0, 1.0), layers=(1, 3))
    assert Rule(SPARSE, layers=range(3)).layers == (0, 1, 2)
    assert Rule(SPARSE).is_unconditional
    assert not rule.is_unconditional


@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, None), ("none", None), ("first-block", "first-block:0.08"), ("taylorseer:3", "taylorseer:3")],
)
def test_step_cache(given: str | None, kept: str | None) -> None:
    plan = Plan("p", cache=given)
    assert plan.cache == kept and plan == Plan("p", cache=kept)
    assert plan_from_data(plan_to_data(plan)) == plan and ("cache" in plan_to_data(plan)) == (kept is not None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("teacache", "the cache 'teacache' is not known"),
        ("pab:0", "give a whole number of at least 2"),
        ("sea:inf", "give a number above 0"),
        (3, "Plan.cache is a int"),
        ("mag:/etc/passwd", "cannot hold the cache mag"),
    ],
)
def test_step_caches_that_a_plan_cannot_hold(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Plan("p", cache=given)
    with pytest.raises(ConfigError, match=says):
        plan_from_data({"name": "p", "rules": [], "cache": given})


def test_provenance() -> None:
    plan = Plan("p", provenance=(("b", "2"), ("a", "1"))).with_provenance(b="3")
    assert plan.provenance == (("a", "1"), ("b", "3"))


def test_text_of_a_head() -> None:
    head = HeadPolicy(PatternSpec.make("radial", decay=0.2), "int8", "pooled_tail")
    assert str(head) == "radial(decay=0.2) int8 + pooled_tail"
    assert str(HeadPolicy()) == "dense"
    repaired = HeadPolicy(PatternSpec("radial"), compensation=CompensationSpec.make("delta", queries=2), skip=30)
    assert str(repaired) == "radial + delta(queries=2), skip 30"
    assert not HeadPolicy(skip=1.0).is_dense and head.tail and not repaired.tail


def test_a_bare_name_is_a_compensation_without_parameters() -> None:
    named, spelt = "pooled_tail", CompensationSpec("pooled_tail")
    assert replace(STA, compensation=named) == replace(STA, compensation=spelt) != STA
    assert CompensationSpec("none") != PatternSpec("none")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(lambda: Rule(SPARSE, noise=(0.5, 1.5)), "valid is 0 <= low < high <= 1", id="noise above 1"),
        pytest.param(lambda: Rule(SPARSE, noise=(-0.5, 1.0)), "valid is 0 <= low < high <= 1", id="noise below 0"),
        pytest.param(lambda: Rule(SPARSE, noise=(0.6, 0.4)), "valid is 0 <= low < high <= 1", id="noise reversed"),
        pytest.param(lambda: Rule(SPARSE, noise=(0.4, 0.4)), "valid is 0 <= low < high <= 1", id="noise empty"),
        pytest.param(lambda: Rule(SPARSE, noise=(0.4, float("nan"))), "give two numbers", id="noise nan"),
        pytest.param(lambda: Rule(SPARSE, noise="01"), "give two numbers", id="noise text"),
        pytest.param(lambda: Rule(SPARSE, noise=(0, True)), "give two numbers", id="noise bool"),
        pytest.param(lambda: Rule(SPARSE, noise=(0.1,)), "give two numbers", id="one bound"),
        pytest.param(lambda: Rule(SPARSE, layers=(0, -1)), "holds -1; layers are whole numbers", id="negative layer"),
        pytest.param(lambda: Rule(SPARSE, layers=(1.5,)), "holds 1.5", id="half a layer"),
        pytest.param(lambda: Rule(SPARSE, layers=()), "would never apply", id="no layers"),
        pytest.param(lambda: Rule(SPARSE, layers=3), "give a tuple of layer numbers", id="bare layer"),
        pytest.param(lambda: Rule(SPARSE, branch="both"), "valid are cond, uncond", id="branch"),
        pytest.param(lambda: Rule(SPARSE, transformer="unet"), "valid are transformer, transformer_2", id="expert"),
        pytest.param(lambda: Rule(STA), "give a LayerPolicy", id="head as policy"),
        pytest.param(lambda: HeadPolicy(precision="fp4"), "valid are native, int8", id="precision"),
        pytest.param(lambda: HeadPolicy(compensation=3), "give a name or CompensationSpec", id="compensation"),
        pytest.param(lambda: HeadPolicy(compensation="a b"), "a compensation's name is 'a b'", id="its name"),
        pytest.param(lambda: HeadPolicy(skip=-1), "give a scale factor of at least 0", id="skip below 0"),
        pytest.param(lambda: HeadPolicy(skip=float("nan")), "give a scale factor of at least 0", id="skip nan"),
        pytest.param(lambda: HeadPolicy(skip=True), "give a scale factor of at least 0", id="skip bool"),
        pytest.param(lambda: HeadPolicy(compensation="pooled_tail"), "the dense pattern skips none", id="dense tail"),
        pytest.param(lambda: HeadPolicy("sta"), "give PatternSpec.make", id="pattern text"),
        pytest.param(lambda: LayerPolicy(()), "LayerPolicy.heads is empty", id="no heads"),
        pytest.param(lambda: LayerPolicy(STA), "give a tuple", id="bare head"),
        pytest.param(lambda: LayerPolicy((None,)), "every entry must be a HeadPolicy", id="no head"),
        pytest.param(lambda: Plan(" "), "give a non-empty text", id="no name"),
        pytest.param(lambda: Plan("p", (SPARSE,)), "rule 0 of plan 'p'", id="policy as rule"),
        pytest.param(lambda: Plan("p", tile=(1, 2, 3)), "give TileShape", id="bare tile"),
        pytest.param(lambda: Plan("p", fingerprint={}), "give a Fingerprint", id="bare fingerprint"),
        pytest.param(lambda: Plan("p", provenance=(("a", 1),)), "must be text", id="provenance"),
    ],
)  # fmt: skip
def test_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


def test_a_bad_tile_is_a_config_error() -> None:
    with pytest.raises(LayoutError):
        Plan("p", tile=TileShape(0, 1, 1))
