"""Figures and conclusions in words, from the same plain values as the JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["conclusions", "figure", "interval"]


def figure(value: Any, digits: int = 2, *, unit: str = "") -> str:
    """A number for people: ``-`` if there is none, ``identical`` for an infinite PSNR, else rounded."""
    if value is None:
        return "-"
    if value in (float("inf"), "inf"):
        return "identical"
    return f"{value:.{digits}f}{unit}"


def interval(summary: Mapping[str, Any], digits: int = 2, *, unit: str = "") -> str:
    """A mean with half the width of its interval, and how many figures are infinite and so not in it."""
    if summary["mean"] is None:
        return "identical" if summary["infinite"] else "-"
    text = figure(summary["mean"], digits, unit=unit)
    if summary["low"] is not None:
        text += f" ± {(summary['high'] - summary['low']) / 2:.{digits}f}"
    if summary["infinite"]:
        text += f" ({summary['infinite']} identical)"
    return text


def conclusions(result: Mapping[str, Any]) -> list[str]:
    """What a comparison says, in sentences: the noise floor, the scale, the gain and its limit.

    Args:
        result: `vidaccel.quality.summarise`.
    """
    summary = result["summary"]
    return [*_floor(summary["controls"]), *_gain(summary)]


def _floor(controls: Mapping[str, Any]) -> list[str]:
    said = []
    for name, control in controls.items():
        psnr = control["psnr"]
        if psnr["mean"] is None:
            said.append(f"control {name}: bit-identical in {psnr['infinite']} of {psnr['infinite']} runs.")
        else:
            said.append(f"control {name}: PSNR {interval(psnr)} dB, SSIM {interval(control['ssim'], 4)}.")
    return said


def _gain(summary: Mapping[str, Any]) -> list[str]:
    speedup = summary["speedup"]["total"]["mean"]
    dense = summary["seconds"]["dense"]
    attention, total = dense["attention"]["mean"], dense["total"]["mean"]
    said = []
    if speedup < 1:
        said.append(f"The plan is slower than dense here: {speedup:.2f}x.")
    if attention is not None:
        share = attention / total
        said.append(
            f"Self-attention is {share:.0%} of a dense run, so the most a plan can gain here is"
            f" {1 / (1 - share):.2f}x; measured: {speedup:.2f}x."
        )
    return said
