"""``vidaccel compare``: dense against a plan, over prompts: what it gains and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import options as opt
from .arguments import call_arguments, check_early, read_image
from .command import command_line, now
from .console import console, show
from .prompts import read_prompts
from .validation import NOT_HEARD

_COMPARISON = "Comparison"


def compare(
    context: typer.Context,
    plan: opt.PlanName = opt.DEFAULT_PLAN,
    model: opt.Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File with one prompt a line, or - for stdin.", rich_help_panel=_COMPARISON),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="One prompt; may be repeated.", rich_help_panel=_COMPARISON)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first prompts.", rich_help_panel=_COMPARISON)
    ] = None,
    controls: Annotated[
        int | None,
        typer.Option(min=0, help="Prompts that get the two control runs [default: all].", rich_help_panel=_COMPARISON),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Times each is run; the fastest counts.", rich_help_panel=_COMPARISON)
    ] = 1,
    seed: opt.Seed = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there.", rich_help_panel=opt.OUTPUT)
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Write a contact sheet (.png) there.", rich_help_panel=opt.OUTPUT)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page with videos, figures and tables there.", rich_help_panel=opt.OUTPUT),
    ] = None,
    html_videos: Annotated[
        int, typer.Option(min=0, help="Prompts whose videos are in the page.", rich_help_panel=opt.OUTPUT)
    ] = 4,
    strict: opt.Strict = False,
    allow_mismatch: opt.AllowMismatch = False,
    weights: opt.WeightFiles = None,
    cache: opt.StepCache = None,
    linear: opt.Linear = None,
    negative_prompt: opt.NegativePrompt = None,
    height: opt.Height = None,
    width: opt.Width = None,
    num_frames: opt.NumFrames = None,
    num_inference_steps: opt.NumInferenceSteps = None,
    guidance_scale: opt.GuidanceScale = None,
    image: opt.Image = None,
    arg: opt.Arg = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    lora: opt.Lora = None,
    cpu_offload: opt.CpuOffload = False,
    compile: opt.Compile = False,
) -> None:
    """Measure a plan against dense: paired quality figures per prompt, seconds by stage, controls, verdict.

    Every prompt runs dense and by the plan from the same seed, after a warm-up. Controls give the scale: the same
    dense run again (the noise floor), a dense run with one step fewer, and the dense video of another prompt.
    """
    from ..files import write_json
    from ..report import check_page_path

    opt.check_outputs(json, sheet, html, read=(prompts, plan, image, opt.cache_file(cache)))
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ConfigError(f"the sheet {sheet} does not end in .png; name it {sheet.stem}.png")
    if html is not None:
        check_page_path(html)
    texts = read_prompts(prompts, prompt or (), limit)
    chosen, stepping = opt.read_cache(cache, opt.read_linear(linear, opt.read_plan(plan)))
    trained = opt.read_weight_files(weights)
    picture = read_image(image)
    check_early(model, context, picture)
    opened = opt.open_pipeline(model, dtype=dtype, device=device, lora=lora, cpu_offload=cpu_offload, compile=compile)
    from rich.progress import track

    from .. import quality, report
    from ..pipelines.generate import Request

    arguments = call_arguments(opened, context, picture)
    requests = [Request(text, seed, arguments) for text in texts]
    patching: dict[str, Any] = {
        "strict": strict,
        "allow_mismatch": allow_mismatch,
        "weights": trained,
        "cache": stepping,
    }
    opened.pipe.set_progress_bar_config(disable=True)
    quality.warm_up(opened.pipe, chosen, requests[0], **patching)
    measured = quality.measure_pairs(opened.pipe, chosen, requests, controls=controls, repeats=repeats, **patching)
    progress = track(measured, "comparing", total=len(requests), console=console(stderr=True), transient=True)
    # the frames of a long comparison do not fit into memory, so each pair leaves only figures, its strip and its clip
    pairs, strips = [], []
    clips: list[report.Clip] = []
    for pair in progress:
        pairs.append(pair.to_dict())
        strips.append(report.strip_of(pair.to_dict(), pair.dense.frames, pair.planned.frames))
        if html is not None and len(clips) < html_videos:
            videos = (pair.dense.frames, pair.planned.frames)
            clips.append(report.clip_of(pair.request.prompt, chosen.name, *videos, opened.frame_rate(arguments).fps))
        settings = quality.run_settings(pair.dense, chosen, stepping)
    reason = quality.why_no_lpips(settings["frames"]["height"], settings["frames"]["width"])
    notes = [] if reason is None else [f"LPIPS is not measured: {reason}."]
    if "sound" in settings:
        notes.append(f"{NOT_HEARD.capitalize()}.")
    result = {
        "model": opened.name,
        "machine": opt.machine(),
        "command": command_line(),
        "created": now(),
        **quality.summarise(chosen.name, settings, pairs),
        "notes": notes,
    }
    if json is not None:
        write_json(json, result)
    if sheet is not None:
        report.write_png(sheet, report.contact_sheet(strips))
    if html is not None:
        report.write_page(html, result, clips)
    show(report.comparison_table(result), report.seconds_table(result))
    for line in [*report.conclusions(result), *notes]:
        typer.echo(line)
    for path in (json, sheet, html):
        if path is not None:
            typer.echo(f"written: {path}")
