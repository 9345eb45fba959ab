"""Verdicts: limits come from the controls, worse figures never get better words."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.results import comparison
from vidaccel.quality import BANDS, bands_of, judge


def figures(psnr: float, flicker: float | None) -> dict[str, Any]:
    """What a control measured."""
    return {"psnr": psnr, "flicker": flicker}


EXACT = figures(math.inf, 0.0)
FEWER = figures(35.0, 2.0)
ANOTHER = figures(12.0, 8.0)


@pytest.mark.parametrize(
    ("psnr", "flicker", "word"),
    [
        (math.inf, 0.0, "indistinguishable"),
        (48.2, 0.9, "indistinguishable"),
        (48.2, 1.5, "close"),
        (40.0, 0.5, "close"),
        (35.0, 2.0, "close"),
        (35.0, 2.1, "visible"),
        (34.9, 0.0, "visible"),
        (12.0, 30.0, "visible"),
        (11.9, 0.0, "different video"),
        (35.0, None, "close"),
    ],
)
def test_words_by_the_controls(psnr: float, flicker: float | None, word: str) -> None:
    bands, missing = bands_of(EXACT, FEWER, ANOTHER)
    assert missing is None and [band.name for band in bands] == list(BANDS)
    assert judge(figures(psnr, flicker), bands) == word


def test_a_device_that_does_not_repeat_itself_sets_the_floor() -> None:
    bands, _ = bands_of(figures(40.0, 1.8), FEWER, ANOTHER)
    assert judge(figures(40.0, 1.8), bands) == "indistinguishable"
    assert judge(figures(39.9, 1.8), bands) == "close"


def test_without_the_scale_there_is_no_verdict() -> None:
    bands, missing = bands_of(EXACT, None, ANOTHER)
    assert bands == () and "--controls 1" in str(missing)
    assert judge(figures(30.0, 1.0), bands) is None


def test_one_prompt_cannot_tell_a_different_video() -> None:
    bands, missing = bands_of(EXACT, FEWER, None)
    assert "single prompt" in str(missing)
    assert judge(figures(3.0, 90.0), bands) == "visible"


_PSNR, _FLICKER = st.floats(1, 80), st.floats(0, 100)
_CONTROL = st.builds(figures, _PSNR, _FLICKER)


@given(_CONTROL, _CONTROL, _CONTROL, _PSNR, _FLICKER, st.floats(0, 20), st.floats(0, 20))
def test_worse_figures_never_get_a_better_word(
    again: Any, fewer: Any, another: Any, psnr: float, flicker: float, less: float, more: float
) -> None:
    """Whatever the controls are, odd ones included: the words are nested."""
    bands, _ = bands_of(again, fewer, another)
    order = [band.name for band in bands]
    better, worse = judge(figures(psnr, flicker), bands), judge(figures(psnr - less, flicker + more), bands)
    assert order.index(str(better)) <= order.index(str(worse))
    assert judge(fewer, bands) in BANDS[:2], "one step fewer is at least close"


def test_a_comparison_carries_them() -> None:
    verdict = comparison()["verdict"]
    assert verdict["overall"] == "visible" and verdict["prompts"] == ["visible", "visible"]
    assert verdict["counts"]["visible"] == 2 and verdict["missing"] is None
    assert comparison(("one",))["verdict"]["missing"] is not None
