"""Figures that contradict each other are remarked on, and intervals end where figures do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.report.results import calibration, comparison
from vidaccel import quality
from vidaccel.calibration.plans import Prediction
from vidaccel.calibration.summary import cost_notes
from vidaccel.quality.figures import FIGURES, RANGES
from vidaccel.quality.plausible import most_by_attention, on_dense, on_gain, on_prediction
from vidaccel.report import comparison_table, conclusions, render_page
from vidaccel.report.words import half_width, interval


def test_more_than_attention_can_give() -> None:
    most = most_by_attention(0.3, 10.0)
    assert most == pytest.approx(10 / 9.7) and on_gain(1.03, most) == []
    (told,) = on_gain(1.24, most)
    assert "No plan can gain that much from attention" in told
    (told,) = on_gain(1.24, most, others=("its step cache",))
    assert "by its step cache" in told and "disturbed" not in told


@pytest.mark.parametrize("attention", [None, 10.0, 12.0])
def test_no_bound_where_there_is_none(attention: float | None) -> None:
    assert most_by_attention(attention, 10.0) is None and on_gain(99.0, None) == []


def test_a_busy_machine() -> None:
    assert on_dense([4.0]) == on_dense([4.0, 4.3, 4.1]) == []
    (told,) = on_dense([4.0, 4.1, 5.0])
    assert "This machine was busy: dense took 4 to 5 s" in told


def test_a_prediction_further_off_than_its_gain() -> None:
    assert on_prediction(5.0, 5.5, 8.0) == on_prediction(5.0, 8.0, 8.0) == []
    assert on_prediction(8.0, 8.1, 8.0) == []  # no gain was predicted, and a tenth is noise
    (told,) = on_prediction(46.8, 4.8, 48.2)
    assert told.startswith("46.8 s were predicted and 4.8 s measured")


@pytest.mark.parametrize("name", FIGURES)
def test_intervals_end_where_the_figure_does(name: str) -> None:
    least, most = RANGES[name]
    figures = [0.1, 1.0] if most == 1 else [0.0, 0.9]  # close to the limit, and far apart
    uncut, found = quality.mean_interval(figures), quality.mean_interval(figures, RANGES[name])
    assert uncut.low is not None and uncut.high is not None and found.low is not None and found.high is not None
    assert uncut.low < least or uncut.high > most
    assert least <= found.low <= found.high <= most


def test_every_interval_of_a_comparison_is_within_its_range() -> None:
    summary = _shaken()["summary"]
    ranges = {**RANGES, "density": (0.0, 1.0), "sparse_density": (0.0, 1.0)}
    found = 0
    for name, (least, most) in ranges.items():
        for mean in (summary[name], *(control[name] for control in summary["controls"].values() if name in control)):
            if mean["low"] is not None:
                found += 1
                assert least <= mean["low"] <= mean["mean"] <= mean["high"] <= most, name
    assert found > 5 and summary["ssim"]["high"] == 1.0 and summary["density"]["high"] == 1.0
    for run in summary["seconds"].values():
        assert all(mean["low"] is None or mean["low"] >= 0 for mean in run.values())


def test_a_cut_interval_is_shown_by_its_ends() -> None:
    mean = quality.mean_interval([0.999, 0.9], (-1.0, 1.0)).to_dict()
    assert half_width(mean, 3).endswith(" to 1.000") and interval(mean, 3).endswith(" to 1.000)")
    assert half_width(quality.mean_interval([20.0, 22.0]).to_dict()).startswith("± ")


def test_remarks_are_shown_everywhere() -> None:
    result = _shaken()
    assert len(result["remarks"]) == 2
    page = render_page({**result, "calibration": calibration()})
    for told in result["remarks"]:
        assert told in conclusions(result) and told in page
    assert "1.0000" in _text(comparison_table(result)) and "1.0001" not in page


def test_a_broken_figure_is_not_called_identical() -> None:
    mean = quality.mean_interval([float("nan"), 0.2]).to_dict()
    assert interval(mean) == "no number" and half_width(mean) == "" and mean["infinite"] == 0


def test_a_plan_that_gains_nothing_is_said_to() -> None:
    choices: Any = SimpleNamespace(dense_seconds=4.41, costs=None)
    (told,) = cost_notes(choices, Prediction(0.1, 0.5, 40.0, 48.2))
    assert told.startswith("predicted to be slower than dense, 48.2 s against 4.41 s")
    assert cost_notes(choices, Prediction(0.1, 0.5, 2.0, 4.0)) == []
    assert cost_notes(choices, Prediction(0.1, 0.5, None, None)) == []


def test_a_quiet_comparison_has_none() -> None:
    assert comparison()["remarks"] == []


def _shaken() -> dict[str, Any]:
    """Two prompts on a busy machine, one almost identical and dense."""
    rows = [dict(row) for row in comparison()["prompts"]]
    for row, ssim, density, total in zip(rows, (0.999, 0.9), (1.0, 0.4), (9.2, 12.0), strict=True):
        dense = {**row["seconds"]["dense"], "total": total, "denoise": total - 1.2, "attention": 0.3}
        row.update(ssim=ssim, density=density, dense_runs=[total])
        row["seconds"] = {**row["seconds"], "dense": dense}
    return {**comparison(), **quality.summarise("sta", {}, rows)}


def _text(table: Any) -> str:
    import io

    from vidaccel.cli.console import console

    screen = console()
    screen.file, screen.width = io.StringIO(), 300
    screen.print(table)
    return screen.file.getvalue()
