"""The pattern of Rectified SpaAttn."""

from __future__ import annotations

import pytest

from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError
from vidaccel.patterns import Rectified, build_pattern


def _oracle(head: Head, drop: float, mass: float, reach: int, first: bool) -> list[list[bool]]:
    rows = []
    for row, i in enumerate(head.video):
        p = head.pooled(i)
        order = sorted(head.video, key=lambda j: -p[j])
        held, below = sum(p[j] for j in head.text), 0
        for j in order:
            held += p[j]
            below += held <= mass
        best = order[: max(int((1 - drop) * len(head.video)), below + 1)]
        kept = []
        for column, j in enumerate(head.video):
            a, b = head.tiles[row], head.tiles[column]
            near = all(abs(x - y) <= reach for x, y in zip(a, b, strict=True))
            kept.append(j in best or near or (first and a[0] == 0 and b[0] == 0))
        rows.append(kept)
    return rows


@pytest.mark.parametrize(
    ("drop", "mass", "neighbours", "first_frame"), [(0.75, 0.3, 1, True), (0.9, 0.85, 0, False), (0.8, 0.01, 0, True)]
)
def test_it_is_its_formula(drop: float, mass: float, neighbours: int, first_frame: bool) -> None:
    pattern = Rectified(drop=drop, mass=mass, neighbours=neighbours, first_frame=first_frame)
    keeps_its_promises(pattern, lambda head: _oracle(head, drop, mass, neighbours, first_frame))


def test_words_and_mistakes() -> None:
    assert Rectified().resolved(LAYOUTS[0]) == (
        "at least 4 of 18 blocks a row and 0.3 of the estimated attention + tiles up to 1 apart"
        " + first frame with itself"
    )
    assert Rectified(drop=0.8).least(LAYOUTS[0]) == 3
    for params, message in (
        ({"drop": 1.0}, "drop is 1.0; give a share from 0 up to, not including, 1"),
        ({"mass": 0}, "mass is 0"),
        ({"neighbours": -1}, "neighbours is -1; give a whole number of at least 0"),
        ({"first_frame": "yes"}, "first_frame is 'yes'; give true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_pattern(PatternSpec.make("rectified", **params))
