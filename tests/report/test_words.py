"""Figures and conclusions in words."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from vidaccel.report import comparison_table, conclusions, demo_table, seconds_table
from vidaccel.report.words import figure, interval


def mean(value: float | None, *, infinite: int = 0, half: float | None = None) -> dict[str, Any]:
    """An interval as `vidaccel.quality.Interval.to_dict` writes it."""
    ends = (None, None) if half is None else (value - half, value + half)
    return {"mean": value, "low": ends[0], "high": ends[1], "count": 0 if value is None else 2, "infinite": infinite}


def result(dense: float, plan: float, attention: float | None, floor: dict[str, Any]) -> dict[str, Any]:
    """A comparison of one prompt that took these seconds."""
    seconds = {
        "dense": {
            "text": 0.1,
            "denoise": dense - 1,
            "attention": attention,
            "decode": 0.5,
            "other": 0.4,
            "total": dense,
        },
        "plan": {"text": 0.1, "denoise": plan - 1, "attention": 1.0, "decode": 0.5, "other": 0.4, "total": plan},
    }
    speedup = {"total": dense / plan, "denoise": (dense - 1) / (plan - 1)}
    row = {
        "prompt": "a cat", "psnr": 21.5, "ssim": 0.8, "density": 0.25, "speedup": speedup, "seconds": seconds,
    }  # fmt: skip
    summary = {
        "psnr": mean(21.5),
        "ssim": mean(0.8),
        "density": mean(0.25),
        "speedup": {part: mean(value) for part, value in speedup.items()},
        "seconds": {run: {stage: mean(value) for stage, value in stages.items()} for run, stages in seconds.items()},
        "controls": {"dense again": {"psnr": floor, "ssim": mean(1.0)}},
        "most_by_attention": None if attention is None else dense / (dense - attention),
    }
    return {"plan": "sta", "prompts": [row], "summary": summary}


def shown(table: Any) -> str:
    """A table as a wide terminal shows it."""
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the console
    console.print(table)
    return console.export_text()


def test_figures_for_people() -> None:
    assert (figure(None), figure(math.inf), figure("inf"), figure(1.234, unit="x")) == (
        "-", "identical", "identical", "1.23x",
    )  # fmt: skip
    assert interval(mean(20.0, half=1.5)) == "20.00 ± 1.50"
    assert interval(mean(20.0, half=1.5, infinite=1)) == "20.00 ± 1.50 (1 identical)"
    assert interval(mean(None, infinite=3)) == "identical"
    assert interval(mean(None)) == "-"


def test_a_deterministic_device_is_said_to_be_one() -> None:
    said = conclusions(result(10.0, 5.0, 6.0, mean(None, infinite=2)))
    assert said[0] == "control dense again: bit-identical in 2 of 2 runs."
    assert "Self-attention is 60% of a dense run" in said[1] and "2.50x; measured: 2.00x" in said[1]


def test_a_noise_floor_is_a_figure() -> None:
    assert "PSNR 39.50 ± 0.50 dB" in conclusions(result(10.0, 5.0, None, mean(39.5, half=0.5)))[0]


def test_a_loss_is_called_a_loss() -> None:
    assert "The plan is slower than dense here: 0.83x." in conclusions(result(5.0, 6.0, 2.0, mean(40.0)))


def test_tables_show_the_figures() -> None:
    figures = result(10.0, 5.0, 6.0, mean(None, infinite=1))
    table = shown(comparison_table(figures))
    assert "21.50" in table and "2.00x" in table and "control: dense again" in table and "identical" in table
    stages = shown(seconds_table(figures))
    assert "of it attention" in stages and "6.00x" in stages  # 6 s of attention against 1 s
    demo = shown(demo_table(figures))
    assert "plan sta" in demo and "0.250" in demo and "2.00x" in demo


def test_an_unmeasured_share_is_left_out() -> None:
    figures = result(10.0, 5.0, None, mean(40.0))
    assert len(conclusions(figures)) == 1
    assert "of it attention" in shown(seconds_table(figures))
