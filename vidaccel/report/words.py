"""Figures and conclusions in words, from the same plain values as the JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "LABELS",
    "conclusions",
    "figure",
    "gains",
    "half_width",
    "has_figure",
    "interval",
    "mean_text",
    "most_by_attention",
    "remarks",
]

#: Name of a figure -> heading, digits, unit, which way is better.
LABELS: dict[str, tuple[str, int, str, str]] = {
    "psnr": ("PSNR", 2, " dB", "higher is better"),
    "ssim": ("SSIM", 4, "", "higher is better"),
    "flicker": ("flicker", 2, "", "grey levels, lower is better"),
    "latent_error": ("latent error", 3, "", "relative L2, lower is better"),
    "lpips": ("LPIPS", 3, "", "lower is better"),
}


#: Runs that do the same are further apart than this only where something else runs on the machine.
_BUSY = 1.1


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
        width = half_width(summary, digits)
        text += f" {width}" if width.startswith("±") else f" ({width})"
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
    """Half the width of an interval as "± 0.12", or nothing for fewer than two figures.

    Both ends, as "0.91 to 1.00", where one is nearer to the mean: an interval ends where the figure does.
    """
    if summary["low"] is None:
        return ""
    below, above = summary["mean"] - summary["low"], summary["high"] - summary["mean"]
    if abs(below - above) > 1e-9 * max(below, above):
        return f"{summary['low']:.{digits}f} to {summary['high']:.{digits}f}"
    return f"± {(below + above) / 2:.{digits}f}"


def conclusions(result: Mapping[str, Any]) -> list[str]:
    """What a comparison says, in sentences: the noise floor, the scale, the gain and its limit, the verdict.

    Args:
        result: `vidaccel.quality.summarise`.
    """
    return [*_floor(result["summary"]["controls"]), *gains(result)]


def gains(result: Mapping[str, Any]) -> list[str]:
    """The same without the controls."""
    return [*_gain(result), *remarks(result), *_verdict(result.get("verdict"))]


def most_by_attention(summary: Mapping[str, Any]) -> float | None:
    """The speed-up that no plan can exceed by attention alone (Amdahl); ``None`` where the share is not known."""
    dense = summary["seconds"]["dense"]
    attention, total = (dense.get(stage, {}).get("mean") for stage in ("attention", "total"))
    if not attention or not total:
        return None
    return math.inf if attention >= total else 1 / (1 - attention / total)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What makes seconds doubtful: a busy machine, and a speed-up beyond what the plan can give."""
    summary, said = result["summary"], []
    runs = summary.get("dense_runs") or []
    if runs and max(runs) > _BUSY * min(runs):
        said.append(
            f"This machine was busy: {len(runs)} dense runs, which do the same, took {min(runs):.2f} to {max(runs):.2f}"
            " s. Seconds and speed-ups are no more exact than that; run again on an idle machine, or with more repeats."
        )
    most, speedup = most_by_attention(summary), summary["speedup"]["total"]["mean"]
    if most is not None and speedup > most and not _has_more_than_attention(result):
        said.append(
            f"The measured {speedup:.2f}x is more than the {most:.2f}x that attention alone can give, so what is beyond"
            " it is no gain of the plan but a difference between the runs."
        )
    return said


def _has_more_than_attention(result: Mapping[str, Any]) -> bool:
    """Whether the plan's runs have something else that saves time: a step cache or 8-bit Linears."""
    settings, calibration = result.get("settings") or {}, result.get("calibration") or {}
    return any((settings.get("cache"), settings.get("linear"), calibration.get("cache"), calibration.get("linears")))


def _floor(controls: Mapping[str, Any]) -> list[str]:
    said = []
    for name, control in controls.items():
        psnr = control["psnr"]
        if psnr["mean"] is None:
            said.append(f"control {name}: bit-identical in {psnr['infinite']} of {psnr['infinite']} runs.")
        else:
            said.append(f"control {name}: PSNR {interval(psnr)} dB, SSIM {interval(control['ssim'], 4)}.")
    return said


def _gain(result: Mapping[str, Any]) -> list[str]:
    summary = result["summary"]
    speedup = summary["speedup"]["total"]["mean"]
    dense = summary["seconds"]["dense"]
    attention, total = dense["attention"]["mean"], dense["total"]["mean"]
    said = []
    if speedup < 1:
        said.append(f"The plan is slower than dense here: {speedup:.2f}x.")
    most = most_by_attention(summary)
    if most is not None:
        share = attention / total
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
