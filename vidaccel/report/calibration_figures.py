"""The figures of a calibration: prediction against measurement, Pareto front, heat-maps, attention mass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .figures import finite
from .svg import ACCENT, FAINT, INK, SECOND, SERIES, Drawing, Drawings

__all__ = ["draw_front", "draw_heatmaps", "draw_mass", "draw_prediction", "draw_words"]

_COLUMNS = 4

# what a heat-map shows -> (label of its scale, fixed limits or None)
_SCALES: dict[str, tuple[str, tuple[float, float] | None]] = {
    "density": ("density: kept token pairs", (0.0, 1.0)),
    "error": ("predicted error", None),
}


def draw_prediction(drawings: Drawings, points: Sequence[Mapping[str, Any]], correlation: float | None) -> Drawing:
    """Measured over predicted error, one dot a layer and head.

    Args:
        points: ``predicted`` and ``measured`` of each; those that are not finite are left out.
        correlation: Spearman's rank correlation over them.
    """
    pairs = [(finite(point["predicted"]), finite(point["measured"])) for point in points]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]

    def paint(canvas: Figure) -> None:
        axes = canvas.subplots()
        if known and min(min(pair) for pair in known) > 0:
            axes.set_xscale("log")
            axes.set_yscale("log")
        if known:
            ends = [min(min(pair) for pair in known), max(max(pair) for pair in known)]
            axes.plot(ends, ends, color=FAINT, linewidth=1)
            axes.scatter([a for a, _ in known], [b for _, b in known], s=10, color=ACCENT, alpha=0.7, linewidth=0)
        axes.set_xlabel("predicted error")
        axes.set_ylabel("measured error")

    rank = "" if correlation is None else f" Rank correlation {correlation:.3f}."
    return drawings.draw(
        paint,
        (4.2, 3.4),
        alt=f"Measured over predicted error of {len(known)} layers and heads.{rank}",
        caption=f"One dot a layer and head; on the line, prediction and measurement agree.{rank}",
    )


def draw_front(drawings: Drawings, front: Sequence[Mapping[str, float]], chosen: Mapping[str, float] | None) -> Drawing:
    """Least error over cost, as far as the observations allow, and the plan that was chosen.

    Args:
        front: ``density``, ``seconds`` and ``error`` of each point, in any order.
        chosen: the same of the plan; ``None`` = none yet.
    """
    points = sorted(front, key=lambda point: point["seconds"])

    def paint(canvas: Figure) -> None:
        both = canvas.subplots(1, 2, sharey=True)
        for axes, cost in zip(both, ("seconds", "density"), strict=True):
            by_cost = sorted(points, key=lambda point: point[cost])
            where, error = [point[cost] for point in by_cost], [point["error"] for point in by_cost]
            axes.plot(where, error, color=ACCENT, marker="o", markersize=3, linewidth=1.2)
            if chosen is not None:
                axes.scatter(
                    [chosen[cost]], [chosen["error"]], s=90, marker="D", facecolor="none", edgecolor=SECOND,
                    linewidth=1.8, zorder=3,
                )  # fmt: skip
            axes.set_xlabel(cost)
        both[0].set_ylabel("predicted error")

    mark = "" if chosen is None else (
        f" Chosen: {chosen['seconds']:.3g} s, density {chosen['density']:.3f}, error {chosen['error']:.3g}."
    )  # fmt: skip
    return drawings.draw(
        paint,
        (5.4, 2.8),
        alt=f"Pareto front of {len(points)} plans, predicted error over seconds and over density.{mark}",
        caption=f"No plan from these observations has less error at the same cost.{mark}"
        + ("" if chosen is None else " The diamond marks it."),
    )


def draw_heatmaps(drawings: Drawings, kind: str, panels: Sequence[Mapping[str, Any]]) -> Drawing:
    """Layers down, heads across, one panel for each range of noise levels.

    Args:
        kind: ``density`` or ``error``.
        panels: ``title`` and ``values`` [layers][heads] of each; ``None`` = not known.
    """
    label, limits = _SCALES[kind]
    tables = [np.array(panel["values"], dtype=float) for panel in panels]
    scale = _scale(tables) if limits is None else Normalize(*limits)
    images: list[Any] = []

    def fill(axes: Axes, place: int) -> None:
        images.append(axes.imshow(tables[place], norm=scale, cmap="viridis", **_PIXELS))

    def finish(canvas: Figure, grid: list[Axes]) -> None:
        canvas.colorbar(images[0], ax=grid, label=label)

    means = [f"{panel['title']}: mean {_mean(table)}" for panel, table in zip(panels, tables, strict=True)]
    return drawings.draw(
        lambda canvas: _panels(canvas, panels, fill, finish),
        _size(tables),
        alt=f"Heat-maps of {label}, layers by heads. {'; '.join(means)}.",
        caption=f"{label.capitalize()}, by noise level, layer and head.",
    )


def draw_words(drawings: Drawings, panels: Sequence[Mapping[str, Any]]) -> Drawing:
    """The same for precisions, which are names: one colour a name.

    Args:
        panels: ``title`` and ``values`` [layers][heads], texts.
    """
    names = sorted({name for panel in panels for row in panel["values"] for name in row})
    colours = [SERIES[place % len(SERIES)] for place in range(len(names))]
    tables = [np.array([[names.index(name) for name in row] for row in panel["values"]]) for panel in panels]

    def fill(axes: Axes, place: int) -> None:
        # every name gets its own colour even where a panel has one name only
        axes.imshow(tables[place], vmin=-0.5, vmax=len(names) - 0.5, cmap=ListedColormap(colours), **_PIXELS)

    def finish(canvas: Figure, grid: list[Axes]) -> None:
        shown = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
        canvas.legend(handles=shown, loc="outside upper left", ncols=2)

    shares = [f"{name} {_share(tables, place):.0%}" for place, name in enumerate(names)]
    return drawings.draw(
        lambda canvas: _panels(canvas, panels, fill, finish),
        _size(tables, extra=0.2 * (-(-len(names) // 2))),
        alt=f"Precision by layer and head: {', '.join(shares)} of all.",
        caption=f"Precision, by noise level, layer and head: {', '.join(shares)}.",
    )


def draw_mass(drawings: Drawings, bins: Sequence[Mapping[str, Any]]) -> Drawing:
    """Attention mass that each candidate keeps: mean over layers and heads, and the range low to high.

    Args:
        bins: ``title``, ``candidates``, ``mean``, ``low`` and ``high`` of each range of noise levels.
    """
    most = max((len(part["candidates"]) for part in bins), default=1)

    def paint(canvas: Figure) -> None:
        grid = canvas.subplots(len(bins), 1, squeeze=False, sharex=True)
        for axes, part in zip(grid.flat, bins, strict=True):
            places = range(len(part["candidates"]))
            axes.hlines(places, part["low"], part["high"], color=FAINT, linewidth=3)
            axes.scatter(part["mean"], places, s=22, color=ACCENT, zorder=3)
            axes.set_yticks(places, [])
            for place, name in zip(places, part["candidates"], strict=True):
                axes.annotate(
                    name, (0, place), xytext=(-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                    ha="right", va="center", fontsize=8, color=INK, parse_math=False,
                )  # fmt: skip
            axes.set_ylim(len(part["candidates"]) - 0.5, -0.5)
            axes.set_xlim(0, 1.02)
            axes.set_title(part["title"], loc="left", parse_math=False)
        grid.flat[-1].set_xlabel("attention mass kept")

    def best(part: Mapping[str, Any]) -> str:
        place = int(np.argmax(part["mean"]))
        return f"{part['title']}: most by {part['candidates'][place]}, {part['mean'][place]:.3f}"

    return drawings.draw(
        paint,
        (5.4, (0.6 + 0.19 * most) * max(len(bins), 1) + 0.3),
        alt=f"Attention mass kept. {'; '.join(best(part) for part in bins)}.",
        caption="Share of the attention mass that each candidate keeps: mean (dot) and range over layers and heads.",
    )


_PIXELS: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}


def _panels(
    canvas: Figure,
    panels: Sequence[Mapping[str, Any]],
    fill: Callable[[Axes, int], None],
    finish: Callable[[Figure, list[Axes]], None],
) -> None:
    columns = min(len(panels), _COLUMNS)
    grid = list(canvas.subplots(-(-len(panels) // columns), columns, squeeze=False, sharex=True, sharey=True).flat)
    for place, panel in enumerate(panels):
        fill(grid[place], place)
        grid[place].set_title(panel["title"], fontsize=8, parse_math=False)
        grid[place].locator_params(integer=True, nbins=6)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    canvas.supylabel("layer", fontsize=9)
    canvas.supxlabel("head", fontsize=9)
    finish(canvas, grid)


def _size(tables: Sequence[Any], *, extra: float = 0.0) -> tuple[float, float]:
    rows = -(-len(tables) // _COLUMNS)
    layers = tables[0].shape[0] if tables else 1
    return 5.4, 0.6 + extra + rows * max(1.6, min(3.2, 0.11 * layers))


def _mean(table: Any) -> str:
    known = table[np.isfinite(table)]
    return f"{known.mean():.3g}" if known.size else "unknown"


def _scale(tables: Sequence[Any]) -> Normalize:
    """One scale for all panels: logarithmic, since errors span decades, or linear where some are zero."""
    known = np.concatenate([table[np.isfinite(table)] for table in tables])
    if not known.size:
        return Normalize(0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    return LogNorm(low, high) if 0 < low < high else Normalize(0.0, high or 1.0)


def _share(tables: Sequence[Any], place: int) -> float:
    return float(np.mean(np.concatenate([table.ravel() for table in tables]) == place))
