"""Figures and conclusions in words, from the same plain values as the JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["LABELS", "conclusions", "figure", "gains", "half_width", "has_figure", "interval", "mean_text"]

#: Name of a figure -> heading, digits, unit, which way is better.
LABELS: dict[str, tuple[str, int, str, str]] = {
    "psnr": ("PSNR", 2, " dB", "higher is better"),
    "ssim": ("SSIM", 4, "", "higher is better"),
    "flicker": ("flicker", 2, "", "grey levels, lower is better"),
    "latent_error": ("latent error", 3, "", "relative L2, lower is better"),
    "lpips": ("LPIPS", 3, "", "lower is better"),
}


def figure(value: Any, digits: int = 2, *, unit: str = "") -> str:
    """A number for people: ``-`` if there is none, ``identical`` for an infinite PSNR, else rounded."""
    if value is None:
        return "-"
    if value != value:
        return "no number"
    if value in (float("inf"), "inf"):
        return "identical"
    return f"{value:.{digits}f}{unit}"


def interval(summary: Mapping[str, Any], digits: int = 2, *, unit: str = "") -> str:
    """A mean with half the width of its interval, and how many figures are infinite and so not in it."""
    if summary["mean"] is None:
        return "identical" if summary["infinite"] else "-"
    text = figure(summary["mean"], digits, unit=unit)
    if summary["low"] is not None:
        band = half_width(summary, digits)
        text += f" {band}" if band.startswith("±") else f" ({band})"
    if summary["infinite"]:
        text += f" ({summary['infinite']} identical)"
    return text


def mean_text(summary: Mapping[str, Any], digits: int = 2, unit: str = "") -> str:
    """The mean alone; ``identical`` where all figures are infinite."""
    if summary["mean"] is None:
        return interval(summary)
    return figure(summary["mean"], digits, unit=unit)


def has_figure(summary: Mapping[str, Any], name: str) -> bool:
    """Whether any prompt has this figure."""
    mean = summary.get(name)
    return mean is not None and mean["count"] + mean["infinite"] > 0


def half_width(summary: Mapping[str, Any], digits: int = 2) -> str:
    """An interval as "± 0.12", by its ends where a limit of the figure cuts it; nothing for fewer than two figures."""
    if summary["low"] is None:
        return ""
    below, above = (f"{abs(summary[end] - summary['mean']):.{digits}f}" for end in ("low", "high"))
    return f"± {above}" if below == above else f"{summary['low']:.{digits}f} to {summary['high']:.{digits}f}"


def conclusions(result: Mapping[str, Any]) -> list[str]:
    """What a comparison says, in sentences: the noise floor, the scale, the gain and its limit, the verdict.

    Args:
        result: `vidaccel.quality.summarise`.
    """
    return [*_floor(result["summary"]["controls"]), *gains(result)]


def gains(result: Mapping[str, Any]) -> list[str]:
    """The same without the controls."""
    return [*_gain(result["summary"]), *result.get("remarks", ()), *_verdict(result.get("verdict"))]


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
    dense, most = summary["seconds"]["dense"], summary["most_by_attention"]
    said = []
    if speedup < 1:
        said.append(f"The plan is slower than dense here: {speedup:.2f}x.")
    if most is not None:
        share = dense["attention"]["mean"] / dense["total"]["mean"]
        said.append(
            f"Self-attention is {share:.0%} of a dense run, so the most that attention alone can gain here is"
            f" {most:.2f}x; measured: {speedup:.2f}x."
        )
    return said


def _verdict(verdict: Mapping[str, Any] | None) -> list[str]:
    if verdict is None:
        return []
    said = []
    if verdict["overall"] is not None:
        why = next(band["why"] for band in verdict["bands"] if band["name"] == verdict["overall"])
        counts = ", ".join(f"{number} {name}" for name, number in verdict["counts"].items() if number)
        said.append(f"Verdict on the mean: {verdict['overall']} (prompts: {counts}). {why}")
    if verdict["missing"] is not None:
        what = "No verdict" if verdict["overall"] is None else "Not every verdict is possible"
        said.append(f"{what}: {verdict['missing']}.")
    return said
