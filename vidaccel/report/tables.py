"""Comparisons as tables for the terminal, made from the same plain values as the JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .words import figure, interval

__all__ = ["comparison_table", "demo_table", "seconds_table"]


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Quality and speed-up by prompt, the mean with its 95% interval, and the controls.

    Args:
        result: `vidaccel.quality.summarise`.
    """
    table = Table(title=f"plan {result['plan']} against dense, same prompt and seed")
    table.add_column("prompt", overflow="fold")
    for name in ("PSNR dB", "SSIM", "density", "speed-up", "denoise speed-up"):
        table.add_column(name, justify="right")
    for row in result["prompts"]:
        speedup = row["speedup"]
        table.add_row(
            row["prompt"],
            figure(row["psnr"]),
            figure(row["ssim"], 4),
            figure(row["density"], 3),
            figure(speedup["total"], unit="x"),
            figure(speedup["denoise"], unit="x"),
        )
    summary = result["summary"]
    table.add_section()
    table.add_row(
        "mean ± 95% interval",
        interval(summary["psnr"]),
        interval(summary["ssim"], 4),
        interval(summary["density"], 3),
        interval(summary["speedup"]["total"], unit="x"),
        interval(summary["speedup"]["denoise"], unit="x"),
        style="bold",
    )
    for name, control in summary["controls"].items():
        table.add_row(f"control: {name}", interval(control["psnr"]), interval(control["ssim"], 4), "1.000", "", "")
    return table


def seconds_table(result: Mapping[str, Any]) -> Table:
    """Mean seconds by stage, dense and by the plan, and the speed-up of each stage.

    Attention is a part of denoising, not one more stage.
    """
    seconds = result["summary"]["seconds"]
    table = Table(title="mean seconds by stage")
    table.add_column("stage")
    for name in ("dense", "plan", "speed-up"):
        table.add_column(name, justify="right")
    order = ("text", "denoise", "attention", "decode", "other", "total")
    for stage in order:
        dense, plan = (seconds[run][stage]["mean"] for run in ("dense", "plan"))
        faster = figure(dense / plan, unit="x") if dense is not None and plan else "-"
        name = "  of it attention" if stage == "attention" else stage
        table.add_row(name, figure(dense, 3), figure(plan, 3), faster, style="bold" if stage == "total" else "")
    return table


def demo_table(result: Mapping[str, Any]) -> Table:
    """Dense and plan side by side for one prompt.

    Args:
        result: `vidaccel.quality.summarise` of one pair.
    """
    pair = result["prompts"][0]
    seconds = pair["seconds"]
    table = Table()
    for name in ("", "dense", f"plan {result['plan']}"):
        table.add_column(name, justify="right" if name else "left")
    for label, stage in (("seconds", "total"), ("  denoising", "denoise"), ("  self-attention", "attention")):
        table.add_row(label, figure(seconds["dense"][stage]), figure(seconds["plan"][stage]))
    table.add_row("speed-up", "1.00x", figure(pair["speedup"]["total"], unit="x"), style="bold")
    table.add_row("density", "1.000", figure(pair["density"], 3))
    table.add_row("PSNR to dense, dB", "", figure(pair["psnr"]))
    table.add_row("SSIM to dense", "", figure(pair["ssim"], 4))
    return table
