"""What ``calibrate`` and ``solve`` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from .console import show
from .linears import linear_table

__all__ = ["cache_table", "front_table", "print_result"]


def print_result(found: Mapping[str, Any], remarks: Sequence[str] = ()) -> None:
    """Prediction beside measurement, the front, and the notes, of :func:`.summary.calibration_result`.

    Args:
        remarks: on the timings of the validation runs, see :mod:`vidaccel.quality.plausible`.
    """
    from rich.table import Table

    predicted, dense, measured = found["predicted"], found["dense"], found.get("measured") or {}
    table = Table(title="the plan, predicted and measured on other seeds")
    for name in ("", "predicted", "measured"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("density over all calls", _figure(predicted["density"]), _figure(measured.get("density")))
    table.add_row(found["costs"]["seconds"], _figure(predicted["seconds"]), _figure(measured.get("seconds")))
    faster = None if not predicted["seconds"] else dense["seconds"] / predicted["seconds"]
    table.add_row("speed-up of that", _figure(faster), _figure(measured.get("speedup")))
    table.add_row("relative error of the final latent", _figure(predicted["error"]), _figure(measured.get("error")))
    if "after_validation" in found:
        after = found["after_validation"]["error"]
        table.add_row("the same, prediction fitted to these runs too", _figure(after), _figure(measured.get("error")))
    table.add_row("PSNR, dB", "", _figure((measured.get("psnr") or {}).get("mean")))
    show(table, front_table(found["front"], found["costs"]["seconds"]))
    if "linears" in found:
        show(linear_table(found["linears"]))
    if "caches" in found:
        show(cache_table(found["caches"]))
    if found.get("rank_correlation") is not None:
        typer.echo(f"rank correlation of predicted and measured error over heads: {found['rank_correlation']:.3f}")
    for note in [*found["notes"], *remarks]:
        typer.echo(f"note: {note}")


def front_table(front: Sequence[Mapping[str, float | None]], seconds: str = "seconds") -> Any:
    """The Pareto front as a table of at most ten rows; ``seconds`` says what the seconds are."""
    from rich.table import Table

    table = Table(title="predicted error by cost, along the front")
    for name in ("density", seconds, "error"):
        table.add_column(name, justify="right")
    for point in (front[i] for i in sorted({round(n * (len(front) - 1) / 9) for n in range(10)})):
        table.add_row(*(_figure(point[name]) for name in ("density", "seconds", "error")))
    return table


def cache_table(caches: Mapping[str, Any]) -> Any:
    """Step caches and the best plan beside each, predicted and measured, of :func:`.caching.told`."""
    from rich.table import Table

    alone = {one["cache"]: one for one in caches["alone"]}
    table = Table(title="step caches, each with its best plan; the chosen one is marked *")
    table.add_column("cache", no_wrap=True)
    for name in ("alone: error", "seconds / dense", "calls", "with plan: error", "measured", "seconds", "measured"):
        table.add_column(name, justify="right")
    for pair in caches["pairs"]:
        own, predicted, measured = alone.get(pair["cache"], {}), pair["predicted"], pair["measured"] or {}
        cells = [own.get("error"), own.get("seconds"), own.get("calls"), predicted["error"], measured.get("error")]
        cells += [predicted["seconds"], measured.get("seconds")]
        table.add_row(pair["cache"] + (" *" if pair["chosen"] else ""), *map(_figure, cells))
    for cache, reason in caches["left_out"].items():
        typer.echo(f"step cache {cache} left out: {reason}")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
