"""``vidaccel doctor``: what this machine is, which kernels and 8-bit Linears run on it, and why the others cannot."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import show
from .selftests import all_right, on_cuda, run_self_tests, show_self_tests

__all__ = ["doctor"]

_HEAD_DIM = 128  # of Wan, HunyuanVideo and most others


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    test: Annotated[
        bool,
        typer.Option(
            "--test",
            help="Run every kernel that can run here against float64 attention; exits with code 1 if one is wrong.",
        ),
    ] = False,
) -> None:
    """Show the device, versions, and which attention kernels and 8-bit Linears can run here, and why not."""
    import json as codec

    from ..device import default_dtype, device_info

    info = device_info()
    dtype = default_dtype(info.default_device)
    kernels = _kernels(info.default_device, dtype)
    used = {"device": info.default_device, "dtype": str(dtype).removeprefix("torch."), "head_dim": _HEAD_DIM}
    found = run_self_tests(info.default_device, dtype) if test else None
    if json:
        linear = _linear(info.default_device)
        told = {**info.to_dict(), "default": used, "kernels": kernels, "linear": linear}
        if found is not None:
            told.update(self_tests=found, self_tests_on_cuda=on_cuda())
        typer.echo(codec.dumps(told, indent=2))
        _end(found)
        return
    from rich.table import Table

    facts = Table(title=f"vidaccel {info.vidaccel}", show_header=False)
    memory = "" if info.memory_gib is None else f", {info.memory_gib:.0f} GiB"
    facts.add_row("system", f"{info.system}, Python {info.python}")
    facts.add_row("cpu", f"{info.cpu}, {info.cores} cores{memory}, bf16 {'fast' if info.cpu_bf16 else 'slow'}")
    for gpu in info.gpus:
        facts.add_row(
            "gpu", f"{gpu.name}, capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory_gib:.0f} GiB"
        )
    if not info.gpus:
        facts.add_row("gpu", "none that torch can use")
    facts.add_row("default", f"{used['device']}, {used['dtype']}")
    facts.add_row("packages", "\n".join(f"{name} {version or '(missing)'}" for name, version in info.packages))
    if info.environment:
        facts.add_row("environment", "\n".join(f"{name}={value}" for name, value in info.environment))
    show(facts)

    table = Table(title=f"attention kernels for {used['device']}, {used['dtype']}, head size {_HEAD_DIM}")
    for heading in ("kernel", "precision", "runs here"):
        table.add_column(heading, overflow="fold")
    for row in kernels:
        table.add_row(row["kernel"], row["precision"], "yes" if row["why_not"] is None else f"no: {row['why_not']}")
    table.caption = "The first kernel that runs is used; reference is the slow oracle, used only when named."
    show(table)

    linears = Table(title=f"Linear layers in 8 bits for {used['device']} (--linear)")
    for heading in ("precision", "runs here"):
        linears.add_column(heading, overflow="fold")
    for precision, reason in _linear(info.default_device).items():
        linears.add_row(precision, "yes" if reason is None else f"no: {reason}")
    show(linears)
    if found is not None:
        show_self_tests(found, info.default_device, dtype)
    _end(found)


def _end(found: list[dict[str, Any]] | None) -> None:
    """Code 1 if a kernel is not right here."""
    if found is not None and not all_right(found):
        raise typer.Exit(1)


def _linear(device: str) -> dict[str, str | None]:
    """Every 8-bit precision of Linears, and why it cannot run, or ``None``."""
    from ..linear.support import why_not_table

    return why_not_table(device)


def _kernels(device: str, dtype: Any) -> list[dict[str, str | None]]:
    """Every kernel with every precision, and why it cannot run, or ``None``."""
    from ..kernels.contract import KernelRequest
    from ..kernels.dispatch import why_not_table
    from ..types import PRECISIONS

    rows: list[dict[str, str | None]] = []
    for name, precision in PRECISIONS.items():
        request = KernelRequest(device, dtype, _HEAD_DIM, precision, tail=False, return_lse=False)
        for kernel, reason in why_not_table(request).items():
            rows.append({"kernel": kernel, "precision": name, "why_not": reason})
    return sorted(rows, key=lambda row: str(row["kernel"]))
