"""``vidaccel inspect``: what a plan does, as tables and as a heat-map noise level x layer x head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from . import options as opt
from .console import show

if TYPE_CHECKING:
    from ..configs.plan import Plan
    from ..types import VideoGrid

__all__ = ["inspect"]

_GRID = "21x30x52"  # of 81 frames of 480x832 in Wan
#: Tokens that are shown at most: five seconds of 4K have 680,400. Densities take time by the square of the blocks.
_MOST_TOKENS = 2**20
_MOST_DRAWN = 1000


def inspect(
    plan: Annotated[str, typer.Argument(help="Preset name or plan file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the heat-map (.png) there.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(metavar="FxHxW", help=f"Token grid for densities [default: the plan's, else {_GRID}]."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, max=_MOST_DRAWN, help="Layers to draw [default: the model's, else those rules tell apart]."
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_DRAWN, help="Heads to draw [default: the model's, else those rules tell apart]."),
    ] = None,
) -> None:
    """Show a plan: what it was made for, its rules, the density of each pattern, and a heat-map."""
    from .. import report
    from ..files import check_writable

    if output is not None:
        check_writable(report.check_heatmap_path(output))
    chosen = opt.read_plan(plan)
    from rich.table import Table

    from ..layout import TokenLayout

    layout = TokenLayout.of(_grid(grid, chosen), chosen.tile)
    depth, width, note = report.shown_extent(chosen, layers, heads)
    facts = Table(title=f"plan {chosen.name}", show_header=False)
    for name, text in report.plan_facts(chosen, layout):
        facts.add_row(name, text)
    rules = Table(title="rules: the first that matches decides; where none matches, attention is dense")
    for heading in ("noise level", "transformer", "layers", "branch", "policy", "density"):
        rules.add_column(heading, overflow="fold")
    for rule in chosen.rules:
        rules.add_row(*report.rule_row(rule, layout))
    show(facts, rules)
    for line in report.describe_patterns(chosen, layout):
        typer.echo(line)
    if output is not None:
        panels = report.heatmap_panels(chosen, layout, depth, width)
        report.draw_heatmap(output, f"{chosen.name} on {layout.grid} tokens", panels, note=note)
        typer.echo(f"written: {output}")


def _grid(text: str | None, plan: Plan) -> VideoGrid:
    from ..types import VideoGrid

    if text is None and plan.fingerprint is not None and plan.fingerprint.grid is not None:
        return _bounded(plan.fingerprint.grid, f"the plan is for a grid of {plan.fingerprint.grid}")
    parts = (_GRID if text is None else text).lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise ConfigError(f"--grid is {text!r}; give frames x height x width in tokens, for example {_GRID}")
    return _bounded(VideoGrid(*map(int, parts)), f"--grid is {text!r}")


def _bounded(grid: VideoGrid, what: str) -> VideoGrid:
    if grid.tokens > _MOST_TOKENS:
        raise ConfigError(
            f"{what}, which is more than {_MOST_TOKENS:,} tokens; give a smaller one, for example {_GRID}"
        )
    return grid
