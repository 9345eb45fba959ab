"""The figures of a comparison: pairs prompt by prompt beside the controls, and seconds by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .svg import ACCENT, BAND, FAINT, INK, SECOND, SERIES, Drawing, Drawings
from .words import LABELS, figure, interval

__all__ = ["draw_pairs", "draw_stages", "finite", "pairs_note"]

_MARKS = ("-", "--", ":")
_MARK_NAMES = {"-": "solid", "--": "dashed", ":": "dotted"}


def finite(value: Any) -> float | None:
    """``value`` if it is a finite number, else ``None``; JSON files hold "inf" as a text."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def draw_pairs(drawings: Drawings, result: Mapping[str, Any]) -> list[Drawing]:
    """One small figure a measure: a dot for each prompt, the mean with its 95% interval, and the controls as lines.

    Args:
        result: `vidaccel.quality.summarise`.
    """
    rows, summary = result["prompts"], result["summary"]
    drawn = []
    for name, (label, digits, unit, better) in LABELS.items():
        values = [finite(row.get(name)) for row in rows]
        if any(value is not None for value in values):
            lines = _controls(summary, name)
            heading = label + unit.replace(" dB", ", dB")
            drawn.append(_panel(drawings, heading, better, values, summary[name], digits, lines))
    speedups = [finite(row["speedup"]["total"]) for row in rows]
    mean = summary["speedup"]["total"]
    drawn.append(_panel(drawings, "speed-up", "higher is better", speedups, mean, 2, [("dense", 1.0, "-")]))
    return drawn


def pairs_note(result: Mapping[str, Any]) -> str:
    """How to read `draw_pairs`: one text for all panels."""
    rows, summary = result["prompts"], result["summary"]
    marks = {name: mark for panel in LABELS for name, _, mark in _controls(summary, panel)}
    scale = "; ".join(f"{_MARK_NAMES[mark]}: {name}" for name, mark in sorted(marks.items()))
    said = "One dot a prompt, plan against dense from the same seed. The line in the band is the mean, the band its 95%"
    said += (
        f" interval. The other vertical lines are controls{f' ({scale})' if scale else ''}; for the speed-up, dense."
    )
    same = sum(figure(row["psnr"]) == "identical" for row in rows)
    return said + (f" Without a dot for PSNR, because identical: {same}." if same else "")


def _panel(
    drawings: Drawings,
    heading: str,
    better: str,
    values: Sequence[float | None],
    mean: Mapping[str, Any],
    digits: int,
    controls: Sequence[tuple[str, float, str]],
) -> Drawing:
    def paint(canvas: Figure) -> None:
        axes = canvas.subplots()
        _dots(axes, values, mean)
        for _, level, mark in controls:
            axes.axvline(level, color=SECOND, linestyle=mark, linewidth=1.1)
        axes.set_title(heading, loc="left", fontweight="bold")
        axes.set_xlabel(better, fontsize=8)
        axes.set_ylabel("prompt", fontsize=8)

    beside = "".join(f"; {name} {level:.{digits}f}" for name, level, _ in controls)
    alt = f"{heading} of {len(values)} prompts: mean {interval(mean, digits)}{beside}."
    return drawings.draw(paint, (2.25, 1.0 + 0.16 * min(max(len(values), 3), 40)), alt=alt, caption="")


def draw_stages(drawings: Drawings, seconds: Mapping[str, Any]) -> Drawing:
    """Two bars, dense and plan, divided by stage; self-attention apart where it is known for both.

    Args:
        seconds: mean seconds, ``{"dense": {stage: interval}, "plan": {...}}``.
    """
    runs = [{stage: (value["mean"] or 0.0) for stage, value in seconds[run].items()} for run in ("dense", "plan")]
    known = all(seconds[run].get("attention", {}).get("mean") is not None for run in ("dense", "plan"))
    parts: list[tuple[str, list[float]]] = [("text", [run["text"] for run in runs])]
    if known:
        parts.append(("self-attention", [run["attention"] for run in runs]))
        parts.append(("other denoising", [max(run["denoise"] - run["attention"], 0.0) for run in runs]))
    else:
        parts.append(("denoise", [run["denoise"] for run in runs]))
    parts += [("decode", [run["decode"] for run in runs]), ("other", [run["other"] for run in runs])]

    def paint(canvas: Figure) -> None:
        axes = canvas.subplots()
        left = [0.0, 0.0]
        for (name, widths), colour in zip(parts, SERIES, strict=False):
            axes.barh([0, 1], widths, left=left, height=0.62, color=colour, label=name)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_yticks([0, 1], ["dense", "plan"])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        for place, run in enumerate(runs):
            axes.annotate(f" {run['total']:.2f} s", (left[place], place), va="center", fontsize=8, color=INK)
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        canvas.legend(loc="outside upper left", ncols=3, handlelength=1.0, columnspacing=1.2)

    alt = "; ".join(
        f"{name}: " + ", ".join(f"{part} {widths[place]:.2f} s" for part, widths in parts)
        for place, name in enumerate(("dense", "plan"))
    )
    return drawings.draw(paint, (4.8, 1.9), alt=f"Mean seconds by stage. {alt}.", caption="Mean seconds of one video.")


def _dots(axes: Axes, values: Sequence[float | None], mean: Mapping[str, Any]) -> None:
    places = [(value, place) for place, value in enumerate(values, start=1) if value is not None]
    if mean["low"] is not None:
        axes.axvspan(mean["low"], mean["high"], color=BAND, linewidth=0)
    if mean["mean"] is not None:
        axes.axvline(mean["mean"], color=ACCENT, linewidth=1.4)
    axes.scatter([value for value, _ in places], [place for _, place in places], s=18, color=ACCENT, zorder=3)
    axes.set_ylim(len(values) + 0.6, 0.4)
    step = max(1, -(-len(values) // 10))
    axes.set_yticks(range(1, len(values) + 1, step))
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=8)


def _controls(summary: Mapping[str, Any], name: str) -> list[tuple[str, float, str]]:
    """Control, its mean of this figure and the line it is drawn with; controls that are identical have no line."""
    found = []
    for (control, figures), mark in zip(summary["controls"].items(), _MARKS, strict=False):
        mean = finite(figures.get(name, {}).get("mean"))
        if mean is not None and not figures[name]["infinite"]:
            found.append((control, mean, mark))
    return found
