"""The figures of a calibration: prediction against measurement, Pareto front, heat-maps, attention mass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .figures import finite
from .svg import ACCENT, FAINT, SECOND, SERIES, Drawing, Drawings

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


def draw_front(
    drawings: Drawings, front: Sequence[Mapping[str, float | None]], chosen: Mapping[str, float | None] | None
) -> Drawing:
    """Least error over cost, as far as the observations allow, and the plan that was chosen.

    Args:
        front: ``density``, ``seconds`` and ``error`` of each point, in any order; seconds that are not known for all
            points are left out.
        chosen: the same of the plan; ``None`` = none yet.
    """
    costs = [cost for cost in ("seconds", "density") if all(point.get(cost) is not None for point in front)]

    def paint(canvas: Figure) -> None:
        axes_of = canvas.subplots(1, max(len(costs), 1), squeeze=False, sharey=True)[0]
        for axes, cost in zip(axes_of, costs, strict=False):
            points = sorted((_value(point, cost), _value(point, "error")) for point in front)
            axes.scatter(*zip(*points, strict=True), s=6, color=FAINT)
            # plans were solved for one cost, so over the other some are beaten by cheaper ones
            axes.plot(*zip(*_best(points), strict=True), color=ACCENT, marker="o", markersize=2.5, linewidth=1.2)
            if chosen is not None and chosen.get(cost) is not None:
                mark = {"marker": "D", "facecolor": "none", "edgecolor": SECOND, "linewidth": 1.8, "zorder": 3}
                axes.scatter([_value(chosen, cost)], [_value(chosen, "error")], s=90, **mark)
            axes.set_xlabel(cost)
        axes_of[0].set_ylabel("predicted error")

    said = ""
    if chosen is not None:
        parts = [f"{cost} {_value(chosen, cost):.3g}" for cost in (*costs, "error") if chosen.get(cost) is not None]
        said = f" Chosen: {', '.join(parts)}; the diamond marks it."
    return drawings.draw(
        paint,
        (5.4, 2.8) if len(costs) > 1 else (3.6, 2.8),
        alt=f"Pareto front of {len(front)} plans, predicted error over {' and over '.join(costs) or 'cost'}.{said}",
        caption=f"The line: of the solved plans, those that no cheaper one beats.{said}",
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
        shown = tables[place] if limits is not None else np.where(tables[place] > 0, tables[place], np.nan)
        images.append(axes.imshow(shown, norm=scale, cmap="viridis", **_PIXELS))

    def finish(canvas: Figure, grid: list[Axes]) -> None:
        canvas.colorbar(images[0], ax=grid, label=label)

    means = [f"{panel['title']}: mean {_mean(table)}" for panel, table in zip(panels, tables, strict=True)]
    return drawings.draw(
        lambda canvas: _panels(canvas, panels, fill, finish),
        _size(tables),
        alt=f"Heat-maps of {label}, layers by heads. {'; '.join(means)}.",
        caption=f"{label.capitalize()}, by noise level, layer and head."
        + (" Blank: no error, the head runs dense." if limits is None else ""),
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
    """Attention mass that each candidate keeps, one column a range of noise levels.

    Args:
        bins: ``title``, ``candidates``, ``mean``, ``low`` and ``high`` of each; the ends hold most layers and heads.
    """
    names = list(dict.fromkeys(name for part in bins for name in part["candidates"]))
    best = {name: max(_of(part, "mean", name) or 0.0 for part in bins) for name in names}
    shown = sorted(names, key=lambda name: -best[name])[:_MOST_CANDIDATES]

    def paint(canvas: Figure) -> None:
        grid = canvas.subplots(1, len(bins), squeeze=False, sharey=True)[0]
        for axes, part in zip(grid, bins, strict=True):
            rows = [(place, name) for place, name in enumerate(shown) if name in part["candidates"]]
            places = [place for place, _ in rows]
            ends = [[_of(part, end, name) or 0.0 for _, name in rows] for end in ("low", "high")]
            axes.hlines(places, *ends, color=FAINT, linewidth=2)
            axes.scatter([_of(part, "mean", name) or 0.0 for _, name in rows], places, s=14, color=ACCENT, zorder=3)
            axes.set_xlim(0, 1.03)
            axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
            axes.set_title(_bounds(part["title"]), fontsize=7, parse_math=False)
        grid[0].set_yticks(range(len(shown)), [_short(name) for name in shown], fontsize=7, parse_math=False)
        grid[0].set_ylim(len(shown) - 0.5, -0.5)
        canvas.supxlabel("attention mass kept, by noise level", fontsize=8)

    most = [
        f"{part['title']}: {part['candidates'][int(np.argmax(part['mean']))]} {max(part['mean']):.3f}" for part in bins
    ]
    few = "" if len(shown) == len(names) else f" The {len(shown)} of {len(names)} that keep most."
    return drawings.draw(
        paint,
        (5.4, 0.9 + 0.17 * len(shown)),
        alt=f"Attention mass kept by each candidate; the most is {'; '.join(most)}.",
        caption=f"Mean (dot) and range over layers and heads of the attention mass that each candidate keeps.{few}",
    )


_MOST_CANDIDATES = 40
_LONGEST_NAME = 46


def _best(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, error) pairs in ascending order, those with less error than all before."""
    found: list[tuple[float, float]] = []
    for cost, error in points:
        if not found or error < found[-1][1]:
            found.append((cost, error))
    return found


def _of(part: Mapping[str, Any], figure: str, name: str) -> float | None:
    candidates = part["candidates"]
    return part[figure][candidates.index(name)] if name in candidates else None


def _bounds(title: str) -> str:
    """``"noise 0.25 to 0.5"`` as ``"0.25–0.5"``: titles stand side by side."""
    return title.removeprefix("noise ").replace(" to ", "–")


def _short(name: str) -> str:
    """A policy's text without the names of its parameters; the values tell policies apart."""
    name = re.sub(r"\w+=", "", name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _value(point: Mapping[str, float | None], name: str) -> float:
    value = point[name]
    assert value is not None, "points without this figure are left out before"
    return value


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
        grid[place].set_title(_bounds(panel["title"]), fontsize=8, parse_math=False)
        grid[place].locator_params(integer=True, nbins=6)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    canvas.supylabel("layer", fontsize=9)
    canvas.supxlabel("head; above each panel its noise levels", fontsize=9)
    finish(canvas, grid)


def _size(tables: Sequence[Any], *, extra: float = 0.0) -> tuple[float, float]:
    rows = -(-len(tables) // _COLUMNS)
    layers = tables[0].shape[0] if tables else 1
    return 5.4, 0.6 + extra + rows * max(1.6, min(3.2, 0.11 * layers))


def _mean(table: Any) -> str:
    known = table[np.isfinite(table)]
    return f"{known.mean():.3g}" if known.size else "unknown"


def _scale(tables: Sequence[Any]) -> Normalize:
    """One scale for all panels, logarithmic, since errors span decades; zeros (dense heads) stay blank."""
    known = np.concatenate([table[np.isfinite(table) & (table > 0)] for table in tables])
    if not known.size:
        return Normalize(0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    return LogNorm(low, high) if low < high else Normalize(0.0, high)


def _share(tables: Sequence[Any], place: int) -> float:
    return float(np.mean(np.concatenate([table.ravel() for table in tables]) == place))
