"""``vidaccel models``: which pipelines can be patched, what is replaced in them, and what stays dense and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["models"]


def models(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the model families vidaccel knows, what is patched in them, and what is not and why."""
    import json as codec

    from ..patchers.registry import families

    rows = [_row(family) for family in families()]
    if json:
        typer.echo(codec.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="model families", show_lines=True)
    for heading in ("family", "pipelines", "transformers", "patched", "stays dense"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            row["family"],
            "\n".join(row["pipelines"]),
            "\n".join(row["transformers"]),
            f"self-attention ({', '.join(row['processors'])}); tokens: {row['token_order']}",
            row["stays_dense"],
        )
    Console().print(table)
    typer.echo(
        "A pipeline of another family is refused with an error. Layers that cannot run as planned run dense, and the"
        " report says why; --strict makes that an error."
    )


def _row(family: Any) -> dict[str, Any]:
    return {
        "family": family.name,
        "pipelines": list(family.pipelines),
        "transformers": list(family.transformers),
        "processors": list(family.processors),
        "token_order": family.token_order,
        "stays_dense": family.stays_dense,
    }
