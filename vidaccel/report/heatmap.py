"""A plan as a picture: one panel for each range of noise levels, layers down, heads across, colour = density."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..errors import OutputError
from ..files import atomic_path

__all__ = ["check_heatmap_path", "draw_heatmap"]

_MAX_COLUMNS = 5


def check_heatmap_path(path: str | Path) -> Path:
    """The path, if a heat-map can have it.

    Raises:
        OutputError: it does not end in .png.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise OutputError(f"the heat-map {target} does not end in .png; name it {target.stem}.png")
    return target


def draw_heatmap(
    path: str | Path, title: str, panels: Sequence[tuple[str, NDArray[np.float64]]], *, note: str = ""
) -> None:
    """Write the panels as one PNG, whole or not at all.

    Args:
        title: above all panels.
        panels: (title, densities [layers, heads] in [0, 1]) of each panel.
        note: one line below all panels.

    Raises:
        OutputError: the file cannot be written, or does not end in .png.
    """
    target = check_heatmap_path(path)
    columns = min(len(panels), _MAX_COLUMNS)
    rows = -(-len(panels) // columns)
    layers, heads = panels[0][1].shape
    size = (1.6 + columns * max(2.4, min(4.0, heads / 5)), 1.4 + rows * max(2.4, min(5.0, layers / 6)))
    # Figure, not pyplot: no global state, and it needs no display
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes, (name, densities) in zip(grid.flat, panels, strict=False):
        image = axes.imshow(densities, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.set_xticks(_ticks(heads))
        axes.set_yticks(_ticks(layers))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, parse_math=False)  # a dollar sign in a name begins no formula
    figure.supylabel("layer")
    figure.supxlabel("head" + (f"\n{note}" if note else ""), fontsize=9, parse_math=False)
    assert image is not None
    figure.colorbar(image, ax=list(grid.flat), label="density: kept token pairs")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    with atomic_path(target) as temporary:
        temporary.write_bytes(data.getvalue())


def _ticks(count: int) -> list[int]:
    """About eight whole numbers from 0 to ``count`` - 1."""
    return list(range(0, count, max(1, -(-count // 8))))
