"""Pattern specs: equality that knows whole numbers from fractions, and strict reading."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from tests.configs.strategies import specs
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError


def test_whole_numbers_and_fractions_differ() -> None:
    """1 is one tile and 1.0 the whole axis, but Python holds (1,) == (1.0,) == (True,) with equal hashes."""
    made = [PatternSpec.make("sliding_tile", window=(value, 3, 3)) for value in (1, 1.0, True)]
    assert len(set(made)) == 3
    again = [PatternSpec.from_data(json.loads(json.dumps(spec.to_data()))) for spec in made]
    assert again == made
    assert [type(spec.kwargs["window"][0]) for spec in again] == [int, float, bool]


def test_order_and_lists_do_not_matter() -> None:
    one = PatternSpec("p", (("b", [1, [2]]), ("a", None)))
    two = PatternSpec.make("p", a=None, b=(1, (2,)))
    assert one == two
    assert hash(one) == hash(two)
    assert one != "p"


@given(specs)
def test_data_round_trip(spec: PatternSpec) -> None:
    again = PatternSpec.from_data(json.loads(json.dumps(spec.to_data())))
    assert again == spec
    assert again.kwargs.keys() == spec.kwargs.keys()


def test_text_says_it_all() -> None:
    inner = PatternSpec.make("sliding_tile", window=(3, 0.5, 1.0))
    outer = PatternSpec.make("union", patterns=(inner,))
    assert str(inner) == "sliding_tile(window=(3, 0.5, 1.0))"
    assert str(outer) == "union(patterns=(sliding_tile(window=(3, 0.5, 1.0)),))"
    assert str(PatternSpec("dense")) == "dense"
    assert repr(inner) == f"PatternSpec<{inner}>"


def _within(levels: int) -> dict[str, Any]:
    return {"name": "p", "a": _within(levels - 1)} if levels else {"name": "q"}


def _nested(levels: int) -> Any:
    return [_nested(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(5, "give its name, or a mapping", id="not a pattern"),
        pytest.param({"window": 3}, "give its name, or a mapping", id="no name"),
        pytest.param({"name": "no good"}, "a pattern's name is 'no good'", id="bad name"),
        pytest.param({"name": 3}, "a pattern's name is 3", id="number as name"),
        pytest.param({"name": "p", "a b": 1}, "parameter called 'a b'", id="bad parameter"),
        pytest.param({"name": "p", 7: 1}, "parameter called 7", id="number as parameter"),
        pytest.param({"name": "p", "a": float("nan")}, "p.a is nan; give a finite number", id="nan"),
        pytest.param({"name": "p", "a": {1, 2}}, "p.a is {1, 2}; give a number", id="a set"),
        pytest.param({"name": "p", "a": _nested(9)}, "nested deeper", id="deep list"),
        pytest.param({"name": "p", "a": [0] * 99}, "longer than 64", id="long list"),
        pytest.param(_within(7), "nested deeper", id="deep patterns"),
    ],
)  # fmt: skip
def test_bad_data(data: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PatternSpec.from_data(data)
    assert says in str(caught.value)


def test_repeated_parameter() -> None:
    with pytest.raises(ConfigError, match="names a parameter twice"):
        PatternSpec("p", (("a", 1), ("a", 2)))
