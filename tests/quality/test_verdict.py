"""Verdicts: limits come from the controls, worse figures never get better words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.results import comparison
from vidaccel.quality import BANDS, bands_of, judge


@pytest.mark.parametrize(
    ("psnr", "word"),
    [
        (math.inf, "indistinguishable"),
        (48.2, "indistinguishable"),
        (48.1, "close"),
        (26.0, "close"),
        (25.9, "visible"),
        (8.0, "visible"),
        (7.9, "different video"),
    ],
)
def test_words_by_the_controls(psnr: float, word: str) -> None:
    bands, missing = bands_of(math.inf, 26.0, 8.0)
    assert missing is None and [band.name for band in bands] == list(BANDS)
    assert judge(psnr, bands) == word


def test_a_mild_control_leaves_the_scale_to_the_other() -> None:
    """One step fewer that changes nothing anybody sees must not make 40 dB a visible change."""
    bands, _ = bands_of(math.inf, 50.0, 12.0)
    assert judge(40.0, bands) == judge(32.0, bands) == "close" and judge(31.9, bands) == "visible"
    assert "tenth" in bands[1].why
    assert "one denoising step fewer" in bands_of(math.inf, 30.0, 12.0)[0][1].why


def test_a_device_that_does_not_repeat_itself_sets_the_floor() -> None:
    bands, _ = bands_of(40.0, 35.0, 12.0)
    assert judge(40.0, bands) == "indistinguishable" and judge(39.9, bands) == "close"
    assert "again" in bands[0].why


def test_without_the_scale_there_is_no_verdict() -> None:
    bands, missing = bands_of(math.inf, None, 12.0)
    assert bands == () and "--controls 1" in str(missing)
    assert judge(30.0, bands) is None


def test_one_prompt_cannot_tell_a_different_video() -> None:
    bands, missing = bands_of(math.inf, 35.0, None)
    assert "single prompt" in str(missing)
    assert judge(3.0, bands) == "visible"


_PSNR = st.floats(1, 80)


@given(_PSNR, _PSNR, st.none() | _PSNR, _PSNR, st.floats(0, 20))
def test_worse_figures_never_get_a_better_word(
    again: float, fewer: float, another: float | None, psnr: float, less: float
) -> None:
    """Whatever the controls are, odd ones included: the bands are nested."""
    bands, _ = bands_of(again, fewer, another)
    order = [band.name for band in bands]
    assert order.index(str(judge(psnr, bands))) <= order.index(str(judge(psnr - less, bands)))
    assert judge(again, bands) == BANDS[0], "a repetition cannot be told from a repetition"
    assert judge(fewer, bands) in BANDS[:2], "one step fewer is at least close"


def test_a_comparison_carries_them() -> None:
    verdict = comparison()["verdict"]
    assert verdict["overall"] == "visible" and verdict["prompts"] == ["visible", "visible"]
    assert verdict["counts"]["visible"] == 2 and verdict["missing"] is None
    assert comparison(("one",))["verdict"]["missing"] is not None
