"""How the error of whole plans on many prompts follows from added squares."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidaccel.calibration.transfer import Point, Transfer, fit

SIZES = (0.02, 0.3)


@given(
    factors=st.lists(st.floats(0.2, 5), min_size=1, max_size=6),
    power=st.floats(0.5, 1.2),
)
def test_a_law_is_found_again(factors: list[float], power: float) -> None:
    points = [Point(str(p), s**2, factor * s**power) for p, factor in enumerate(factors) for s in SIZES]
    found = fit(points)
    # the power is held back a little towards 1, which changes little between the sizes that were seen
    assert found.power == pytest.approx(power, abs=0.04) and found.prompts == len(factors)
    for s in (0.05, 0.1, 0.2):
        assert found.error(s**2) == pytest.approx(np.mean(factors) * s**power, rel=0.05)
        assert found.squares(found.error(s**2)) == pytest.approx(s**2)
    if len(factors) > 1:
        assert found.spread == pytest.approx(np.std(np.log(factors), ddof=1), abs=0.05)


def test_one_size_says_nothing_about_the_power() -> None:
    """Prompts that differ in sensitivity must not be taken for a power."""
    found = fit([Point("calm", 0.01, 0.1), Point("nervous", 0.0144, 0.36)])
    assert found.power == 1 and found.factor == pytest.approx(2)
    assert found.spread == pytest.approx(math.log(3) / math.sqrt(2))


def test_a_large_error_saturates() -> None:
    found = fit([Point("a", 0.01, 0.1), Point("a", 1.0, 0.5)])
    assert found.error(0.01) == pytest.approx(0.1, rel=0.05) and found.error(1.0) == pytest.approx(0.5, rel=0.05)


def test_nothing_known_changes_nothing() -> None:
    found = fit([Point("a", 0.0, 0.0)])
    assert found == Transfer() and found.error(0.04) == pytest.approx(0.2) and found.squares(0.2) == pytest.approx(0.04)
