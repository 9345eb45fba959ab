"""Comparisons as tables for the terminal, made from the same plain values as the JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .words import LABELS, figure, half_width, has_figure, mean_text

__all__ = ["comparison_table", "demo_table", "seconds_table"]

#: Short where the label is long.
_HEADINGS = {"psnr": "PSNR dB", "latent_error": "latent"}


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Quality and speed-up by prompt, the mean, its 95% interval, and the controls.

    Figures that no prompt has (LPIPS without its weights) have no column.

    Args:
        result: `vidaccel.quality.summarise`.
    """
    summary, verdict = result["summary"], result.get("verdict") or {"bands": []}
    columns = [(name, digits) for name, (_, digits, *_) in LABELS.items() if has_figure(summary, name)]
    # few lines and little space: the table is to fit into 80 columns
    style: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title=f"plan {result['plan']} against dense, same prompt and seed", **style)
    table.add_column("prompt", overflow="fold")
    names = [_HEADINGS.get(name, LABELS[name][0]) for name, _ in columns]
    for name in (*names, "density", "speed-up", *(["verdict"] if verdict["bands"] else [])):
        word = name == "verdict"
        table.add_column(
            name, justify="left" if word else "right", no_wrap=not word, overflow="fold", min_width=9 if word else None
        )
    for place, row in enumerate(result["prompts"]):
        figures = [figure(row[name], digits) for name, digits in columns]
        rest = [figure(row["density"], 3), figure(row["speedup"]["total"], unit="x")]
        table.add_row(row["prompt"], *figures, *rest, *([verdict["prompts"][place] or "-"] if verdict["bands"] else []))
    means = [(summary[name], digits, "") for name, digits in columns]
    means += [(summary["density"], 3, ""), (summary["speedup"]["total"], 2, "x")]
    table.add_section()
    table.add_row("mean", *(mean_text(*mean) for mean in means), verdict.get("overall") or "", style="bold")
    table.add_row("95% interval", *(half_width(mean, digits) for mean, digits, _ in means))
    for name, control in summary["controls"].items():
        shown = [mean_text(control[figure], digits) if figure in control else "-" for figure, digits in columns]
        table.add_row(f"control: {name}", *shown, "1.000", "")
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
