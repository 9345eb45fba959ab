"""Random valid plans, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.linear import LINEAR_PRECISIONS, LinearPlan, LinearRule
from vidaccel.configs.pattern_spec import CompensationSpec, PatternSpec
from vidaccel.configs.plan import BRANCHES, TRANSFORMERS, HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.types import PRECISIONS, TileShape, VideoGrid

__all__ = ["fingerprints", "heads", "linear_plans", "plans", "rules", "specs"]

_names = st.sampled_from(["window", "width", "decay", "a", "b_2", "sliding_tile", "patterns"])
_floats = st.floats(allow_nan=False, allow_infinity=False)
_scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | _floats | st.text(max_size=8)
_extents = st.integers(1, 40)


def _spec(values: st.SearchStrategy, kind: type[PatternSpec] = PatternSpec) -> st.SearchStrategy[PatternSpec]:
    params = st.dictionaries(_names, values | st.tuples(values, values), max_size=3)
    return st.builds(lambda name, given: kind(name, tuple(given.items())), _names, params)


#: Patterns of any name with any parameters, also nested as in a union.
specs = _spec(_scalars | _spec(_scalars))


@st.composite
def heads(draw: st.DrawFn) -> HeadPolicy:
    """One head's policy."""
    spec = draw(st.just(PatternSpec("dense")) | specs)
    rules = st.sampled_from(["none", "pooled_tail"]) | _spec(_scalars, CompensationSpec)
    compensation = "none" if spec.name == "dense" else draw(rules)
    skip = draw(st.sampled_from([0.0, 1e-3, 30.0]))
    return HeadPolicy(spec, draw(st.sampled_from(sorted(PRECISIONS))), compensation, skip)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """A rule with any of its conditions."""
    low, high = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
    return Rule(
        LayerPolicy(tuple(draw(st.lists(heads(), min_size=1, max_size=4)))),
        noise=(low, high),
        transformer=draw(st.none() | st.sampled_from(TRANSFORMERS)),
        layers=draw(st.none() | st.lists(st.integers(0, 65_535), min_size=1, max_size=5).map(tuple)),
        branch=draw(st.none() | st.sampled_from(BRANCHES)),
    )


fingerprints = st.builds(
    Fingerprint,
    model_class=st.none() | st.text(max_size=10),
    config=st.dictionaries(_names, _scalars | st.tuples(_scalars, _scalars), max_size=3).map(
        lambda d: tuple(d.items())
    ),
    heads=st.none() | _extents,
    layers=st.none() | _extents,
    grid=st.none() | st.builds(VideoGrid, _extents, _extents, _extents),
    scheduler=st.none() | st.text(max_size=10),
    vidaccel=st.none() | st.sampled_from(["0.1.0", "0.2.3", "1.0"]),
)

_modules = st.sampled_from(["blocks.*.attn1.to_q", "blocks.*.ffn.net.0.proj", "a.b_2.*.c"])
_linear_rules = st.builds(
    LinearRule,
    precision=st.sampled_from(sorted(LINEAR_PRECISIONS)),
    modules=st.none() | st.lists(_modules, min_size=1, max_size=3).map(tuple),
    layers=st.none() | st.lists(st.integers(0, 65_535), min_size=1, max_size=5).map(tuple),
    transformer=st.none() | st.sampled_from(TRANSFORMERS),
)

#: Precisions of Linears.
linear_plans = st.lists(_linear_rules, min_size=1, max_size=3).map(lambda found: LinearPlan(tuple(found)))

plans = st.builds(
    Plan,
    name=st.text(min_size=1, max_size=10).filter(str.strip),
    rules=st.lists(rules(), max_size=4).map(tuple),
    tile=st.none() | st.builds(TileShape, _extents, _extents, _extents),
    fingerprint=st.none() | fingerprints,
    provenance=st.dictionaries(st.text(max_size=6), st.text(max_size=12), max_size=3).map(lambda d: tuple(d.items())),
    linear=st.none() | linear_plans,
    cache=st.none() | st.sampled_from(["first-block", "first-block:0.12", "taylorseer:3", "pab:2", "faster:4", "sea"]),
)
