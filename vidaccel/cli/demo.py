"""``vidaccel demo``: the small model, one prompt and seed, dense and accelerated, and an honest table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import options as opt
from .console import show

__all__ = ["demo"]


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The accelerated video; the dense one is beside it.")
    ] = Path("outputs/demo.mp4"),
    plan: Annotated[
        str | None,
        typer.Option(help="Preset name or plan file [default: the plan calibrated for the small model]."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to show [default: one the small model knows].")] = None,
    seed: opt.Seed = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Times each is run; the fastest counts.")] = 2,
) -> None:
    """Generate one video with the small model, dense and accelerated, and show what was gained at what cost.

    Writes demo.mp4, demo-dense.mp4, demo.png (contact sheet) and demo.json into outputs/.
    """
    from ..files import check_folder, check_writable, write_json
    from ..pipelines.video import check_video_path, write_video

    check_video_path(output)
    if prompt is not None and not prompt.strip():
        raise ConfigError("there is no prompt: --prompt is empty; say what to show, or leave it out")
    check_folder(output.parent)
    dense_path = output.with_stem(f"{output.stem}-dense")
    sheet, beside = output.with_suffix(".png"), output.with_suffix(".json")
    from ..pipelines.demo import DEMO_PLAN, PROMPTS

    chosen = opt.read_plan(str(DEMO_PLAN) if plan is None else plan)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in (output, dense_path, sheet, beside):
        check_writable(path)
    typer.echo("loading the small model", err=True)
    opened = opt.open_pipeline(None, dtype=None, device=None)
    from .. import quality, report
    from ..pipelines.generate import Request

    request = Request(PROMPTS[0] if prompt is None else prompt, seed, dict(opened.defaults))
    opened.pipe.set_progress_bar_config(desc="denoising", leave=False, disable=None)
    typer.echo(f"generating {request.prompt!r}: a short warm-up, then {repeats} times dense and by the plan", err=True)
    quality.warm_up(opened.pipe, chosen, request)
    pair = quality.measure_pair(opened.pipe, chosen, request, repeats=repeats, controls=(quality.DENSE_AGAIN,))

    fps = opened.frame_rate(request.arguments).fps
    write_video(output, pair.planned.frames, fps)
    write_video(dense_path, pair.dense.frames, fps)
    figures = pair.to_dict()
    report.write_png(sheet, report.contact_sheet([report.strip_of(figures, pair.dense.frames, pair.planned.frames)]))
    result = {
        "model": opened.name,
        "machine": opt.machine(),
        **quality.summarise(chosen.name, quality.run_settings(pair.dense, chosen), [figures]),
    }
    write_json(beside, result)
    typer.echo(f"{pair.report}\n")
    typer.echo(f"{request.prompt}, seed {seed}")
    show(report.demo_table(result))
    for line in report.conclusions(result):
        typer.echo(line)
    typer.echo(f"videos: {dense_path} (dense), {output} (plan {chosen.name}); contact sheet: {sheet}")
