"""The name that was meant."""

from __future__ import annotations

import pytest

from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.errors import ConfigError, did_you_mean
from vidaccel.patterns import build_pattern

NAMES = ("sta", "radial", "svg2", "Dense")


@pytest.mark.parametrize(("typed", "meant"), [("stta", "sta"), ("RADIAL", "radial"), ("dens", "Dense")])
def test_the_nearest_name_is_offered(typed: str, meant: str) -> None:
    assert did_you_mean(typed, NAMES) == f"; did you mean {meant}?"


@pytest.mark.parametrize("typed", ["quicker", "", 3, None])
def test_what_resembles_none_gets_no_guess(typed: object) -> None:
    assert did_you_mean(typed, NAMES) == ""


def test_patterns_have_it() -> None:
    with pytest.raises(ConfigError, match=r"did you mean sliding_tile\?"):
        build_pattern(PatternSpec.make("sliding_tiles", window=[1, 1, 1]))
