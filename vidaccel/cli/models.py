"""``vidaccel models``: which pipelines can be patched, what is replaced in them, and what stays dense and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["models"]

# Video transformers of diffusers where block-sparse self-attention has nothing to gain. All others that no family
# claims only lack a patcher.
_NOTHING_TO_GAIN = {
    "LatteTransformer3DModel": "attends within frames and along time apart, in sequences too short to gain",
    "SanaVideoTransformer3DModel": "linear attention: there are no pairs of tokens to skip",
    "SanaWMTransformer3DModel": "linear attention: there are no pairs of tokens to skip",
}


def models(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the model families vidaccel knows, what is patched in them, and what is not and why."""
    import json as codec

    from ..patchers.registry import families

    known = [_facts(family) for family in families()]
    claimed = {name for facts in known for name in facts["transformers"]}
    others = _unsupported(claimed)
    if json:
        typer.echo(codec.dumps({"families": known, "not_patched": others}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for facts in known:
        table = Table(title=f"family {facts['family']}", show_header=False, show_lines=True)
        table.add_row("pipelines", "\n".join(facts["pipelines"]))
        table.add_row("transformers", "\n".join(facts["transformers"]))
        table.add_row("patched", f"video self-attention: {', '.join(facts['processors'])}")
        table.add_row("tokens", facts["token_order"])
        table.add_row("stays dense", facts["stays_dense"])
        console.print(table)
    table = Table(title="video transformers of this diffusers that are not patched", show_header=False)
    for name, reason in others.items():
        table.add_row(name, reason)
    console.print(table)
    typer.echo(
        "A pipeline that is not patched is refused with an error. A layer that cannot run as planned runs dense, and"
        " the report says why; with --strict it is an error."
    )


def _facts(family: Any) -> dict[str, Any]:
    return {
        "family": family.name,
        "pipelines": list(family.pipelines),
        "transformers": list(family.transformers),
        "processors": list(family.processors),
        "token_order": family.token_order,
        "stays_dense": family.stays_dense,
    }


def _unsupported(claimed: set[str]) -> dict[str, str]:
    """Video transformers of the installed diffusers that no family claims, and why."""
    import diffusers

    names = sorted(name for name in dir(diffusers) if name.endswith("Transformer3DModel") and name not in claimed)
    return {name: _NOTHING_TO_GAIN.get(name, "no patcher yet") for name in names}
