"""``vidaccel inspect``: what a plan does, as tables and as a heat-map noise level x layer x head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from . import options as opt
from .console import console
from .kept import expect

if TYPE_CHECKING:
    from ..configs.plan import Plan
    from ..types import VideoGrid

__all__ = ["inspect"]

_GRID = "21x30x52"  # of 81 frames of 480x832 in Wan
#: Tokens of the largest grid that is shown: masks grow with its square, and take a minute of it on two cores.
_MOST_TOKENS = 1 << 19
#: Layers and heads of the largest heat-map.
_MOST_ROWS = 1000


def inspect(
    plan: Annotated[str, typer.Argument(help="Preset name or plan file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the heat-map (.png) there.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(metavar="FxHxW", help=f"Token grid for densities [default: the plan's, else {_GRID}]."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_ROWS, help="Layers to draw [default: the model's, else those rules tell apart]."),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_ROWS, help="Heads to draw [default: the model's, else those rules tell apart]."),
    ] = None,
) -> None:
    """Show a plan: what it was made for, its rules, the density of each pattern, and a heat-map."""
    from .. import report
    from ..files import check_writable

    if output is not None:
        report.check_heatmap_path(output)
        check_writable(output)
    expect(output)
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
    console().print(facts, rules)
    for line in report.describe_patterns(chosen, layout):
        typer.echo(line)
    if output is not None:
        panels = report.heatmap_panels(chosen, layout, depth, width)
        report.draw_heatmap(output, f"{chosen.name} on {layout.grid} tokens", panels, note=note)
        typer.echo(f"written: {output}")


def _grid(text: str | None, plan: Plan) -> VideoGrid:
    from ..types import VideoGrid

    made_for = None if plan.fingerprint is None else plan.fingerprint.grid
    if text is None and made_for is not None:
        sizes, what = tuple(made_for), "the plan's grid"
    else:
        text, what = _GRID if text is None else text, "--grid"
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise ConfigError(f"--grid is {text!r}; give frames x height x width in tokens, for example {_GRID}")
        sizes = tuple(map(int, parts))
    if math.prod(sizes) > _MOST_TOKENS:
        raise ConfigError(
            f"{what} has {math.prod(sizes):,} tokens, and densities are shown for at most {_MOST_TOKENS:,}; give a"
            f" smaller --grid, for example {_GRID}"
        )
    return VideoGrid(*sizes)
