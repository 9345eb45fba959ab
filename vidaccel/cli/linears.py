"""``--linear`` of ``vidaccel calibrate``, and what it chose as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from .budget import Budget

__all__ = ["LinearWord", "check_combination", "linear_table", "precisions"]

LinearWord = Annotated[
    str | None,
    typer.Option(
        "--linear", metavar="PRECISION", help="Choose 8-bit Linears as well, by torchao: int8, fp8, or auto for what"
        " runs here [default: none].", rich_help_panel="Effort",
    ),
]  # fmt: skip


def check_combination(word: str | None, budget: Budget, target: str | None, caches: object | None) -> None:
    """Refuses what cannot go with ``--linear``, before anything slow is started.

    Raises:
        ConfigError: see there.
    """
    if word is None:
        return
    from ..configs.linear import LINEAR_PRECISIONS

    known = [name for name in LINEAR_PRECISIONS if name != "native"]
    if word not in (*known, "auto"):
        raise ConfigError(f"--linear is {word!r}; valid are {', '.join(known)}, auto")
    if budget.kind == "density":
        raise ConfigError(
            "--density does not count Linears, so --linear has no say; give another budget or leave it out"
        )
    if target is not None:
        raise ConfigError(
            "--target-gpu predicts attention alone, so Linears cannot be chosen for it; leave out --linear"
        )
    if caches is not None:
        raise ConfigError("--linear and --caches are not chosen together; calibrate with one of them at a time")


def precisions(word: str | None, pipe: Any) -> tuple[str, ...]:
    """The precisions that may be chosen for this pipeline, none without ``--linear``."""
    if word is None:
        return ()
    from ..calibration.linear_stage import precisions_for
    from ..pipelines.generate import execution_device

    return precisions_for(word, execution_device(pipe))


def linear_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """What was measured of each kind of Linears, and how many were chosen."""
    from rich.table import Table

    table = Table(title="Linears of the blocks in 8 bits; errors and seconds of a generation with all of a kind")
    for name in ("kind", "precision", "chosen", "worst error", "latent error", "seconds, native", "seconds, 8 bits"):
        table.add_column(name, justify="left" if name in ("kind", "precision") else "right")
    for row in rows:
        figures = [row[name] for name in ("relative_error", "latent_error", "native_seconds", "seconds")]
        counts = f"{row['chosen']} of {row['count']}"
        table.add_row(row["kind"], row["precision"], counts, *(f"{figure:.3g}" for figure in figures))
    return table
