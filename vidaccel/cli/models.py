"""``vidaccel models``: which pipelines can be patched, what is replaced in them, and what stays dense and why."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from .console import show

__all__ = ["models"]


def models(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/MODELS.md.")] = False,
    count: Annotated[
        bool, typer.Option("--count", help="Count the video pipelines of the installed diffusers (imports all).")
    ] = False,
) -> None:
    """List the model families vidaccel knows, what is patched in them, and what is not and why."""
    import json as codec

    if json and markdown:
        raise ConfigError("--json and --markdown are two forms of one output; give one of them")
    if markdown and count:
        raise ConfigError("--count has no place in the page of --markdown; give one of them")
    from ..patchers import catalogue

    rows = catalogue.catalogue()
    found = catalogue.count() if count else None
    if json:
        told = {"families": [row.to_dict() for row in rows]} | ({"count": found} if found is not None else {})
        typer.echo(codec.dumps(told, indent=2))
        return
    if markdown:
        typer.echo(catalogue.markdown(), nl=False)
        return
    from rich.table import Table

    for row in rows:
        table = Table(title=row.family, show_header=False, show_lines=True)
        table.add_row("pipelines", "\n".join(row.pipelines) or "-")
        table.add_row("models", "\n".join(row.transformers) or "-")
        if row.patched:
            table.add_row("patched", f"video self-attention: {', '.join(row.patched)}")
            table.add_row("tokens", row.token_order)
            table.add_row("reordered", "once a forward pass where safe" if row.once else "in every layer")
        table.add_row("stays dense", "\n".join(row.stays_dense) or "nothing")
        show(table)
    if found is not None:
        typer.echo(", ".join(f"{kind.replace('_', ' ')} {len(names)}" for kind, names in found.items()))
    typer.echo(
        "A pipeline without a listed transformer is refused with an error. A layer that cannot run as planned runs"
        " dense, and the report says why; with --strict it is an error."
    )
