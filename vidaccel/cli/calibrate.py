"""``vidaccel calibrate``: watches the user's model and writes the plan with the least error within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from . import budget as bud
from . import options as opt
from .command import command_line, now
from .compare import read_prompts
from .progress import Progress

if TYPE_CHECKING:
    from ..calibration.candidates import CandidateSet
    from ..calibration.solve import Solution

_EFFORT = "Effort"
#: Validation runs have other seeds than those that were watched.
_OTHER_SEED = 1000


def calibrate(
    context: typer.Context,
    model: opt.Model = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line, or - for stdin.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file.", rich_help_panel=opt.OUTPUT)] = Path(
        "plan.safetensors"
    ),
    state: Annotated[
        Path | None,
        typer.Option(
            help="File of observations; an interrupted run goes on with it [default: beside the plan].",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a report page there.", rich_help_panel=opt.OUTPUT)
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there.", rich_help_panel=opt.OUTPUT)
    ] = None,
    speedup: bud.Speedup = None,
    seconds: bud.Seconds = None,
    density: bud.Density = None,
    max_error: bud.MaxError = None,
    psnr: Annotated[
        float | None,
        typer.Option(help="Mean PSNR in dB of validation runs, searched for by running.", rich_help_panel=bud.PANEL),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(help="Set of candidates: a name or a YAML file [default: the device's].", rich_help_panel=_EFFORT),
    ] = None,
    bins: Annotated[int, typer.Option(min=1, help="Noise-level bins.", rich_help_panel=_EFFORT)] = 5,
    tiles: Annotated[int, typer.Option(min=1, help="Query tiles sampled a call.", rich_help_panel=_EFFORT)] = 12,
    probes: Annotated[
        int, typer.Option(min=1, help="Perturbed generations, at least one a bin.", rich_help_panel=_EFFORT)
    ] = 15,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.1, help="For timing, observing and perturbing.", rich_help_panel=_EFFORT)
    ] = None,
    validate: Annotated[
        int, typer.Option(min=0, help="Prompts to check the plan on, with another seed.", rich_help_panel=_EFFORT)
    ] = 2,
    check_heads: Annotated[
        int, typer.Option(min=0, help="Heads whose prediction is checked alone.", rich_help_panel=_EFFORT)
    ] = 0,
    seed: opt.Seed = 0,
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
) -> None:
    """Find the plan with the least error within a budget, for this model, device and video size.

    Watches dense generations of the prompts, scores every candidate on the way, perturbs single layers to learn what
    an error there does to the video, times every candidate, solves, and checks its own prediction on another seed.
    """
    from ..files import write_json

    budget = bud.one_budget(speedup=speedup, seconds=seconds, density=density, max_error=max_error, psnr=psnr)
    if psnr is not None and not validate:
        raise ConfigError("--psnr is found by validation runs, but --validate is 0; give at least 1")
    if output.suffix.lower() != ".safetensors":
        raise ConfigError(f"the plan {output} does not end in .safetensors; name it {output.stem}.safetensors")
    kept = output.with_suffix(".observations.safetensors") if state is None else state
    opt.check_outputs(output, kept, html, json)
    texts = read_prompts(prompts, prompt or (), limit)
    picture = opt.read_image(image)
    from ..calibration.candidates import load_candidates

    chosen = None if candidates is None else load_candidates(candidates)
    opened = opt.open_pipeline(model, dtype=dtype, device=device, lora=lora, cpu_offload=cpu_offload)
    from .. import quality, report
    from ..calibration.calibrate import STANDING_DENSITIES, Calibrator, Effort
    from ..calibration.closed_loop import check_heads as check
    from ..calibration.closed_loop import for_quality
    from ..calibration.plans import Choices
    from ..calibration.predicted import WORTH_IT, ceiling, say_ceiling
    from ..calibration.summary import calibration_result, provenance
    from ..configs.artifact import save_plan
    from ..pipelines.generate import Request

    arguments = opt.call_arguments(opened, context, picture)
    requests = [Request(text, seed + number, arguments) for number, text in enumerate(texts)]
    opened.pipe.set_progress_bar_config(disable=True)
    command = command_line()
    effort = Effort(bins=bins, tiles=tiles, probes=probes, max_minutes=max_minutes or float("inf"))
    with Progress(STANDING_DENSITIES) as progress:
        run = Calibrator(
            opened.pipe, requests, chosen or _default_candidates(opened.pipe), kept, effort=effort, tell=progress.tell
        )
        for policy, reason in run.dropped.items():
            progress.say(f"not a candidate: {policy} ({reason})")
        costs = run.time(budget_seconds=min(60.0, 6.0 * max_minutes) if max_minutes else 60.0)
        times = run.survey.total, run.survey.attention, costs.best_ratio
        progress.say(say_ceiling(*times))
        wanted = {"speedup": budget.value, "seconds": run.survey.total / max(budget.value, 1e-9)}.get(budget.kind)
        if wanted is not None and ceiling(*times) < max(wanted, WORTH_IT):
            raise ConfigError(
                f"{budget} asks for more than can be won at this size, {ceiling(*times):.2f}x at most; ask for less,"
                " try more frames or a higher resolution, or choose by --density"
            )
        progress.watch(run.standing)
        run.observe()
        run.perturb()
        choices = Choices(run.seen, costs, by=budget.by)
        checked = [Request(text, seed + _OTHER_SEED + n, arguments) for n, text in enumerate(texts[:validate])]

        def runs(solution: Solution, controls: int = 0) -> list[quality.Pair]:
            plan = choices.plan(solution, output.stem, {})
            measured = []
            for number, pair in enumerate(quality.measure_pairs(opened.pipe, plan, checked, controls=controls)):
                measured.append(pair)
                progress.tell("validate", number + 1, len(checked))
            return measured

        def mean_psnr(solution: Solution) -> float:
            return sum(pair.psnr for pair in runs(solution)) / len(checked)

        by_runs = budget.kind == "psnr"
        solution = for_quality(choices, mean_psnr, budget.value) if by_runs else budget.solve(choices)
        plan = choices.plan(solution, output.stem, provenance(choices, solution, str(budget), command))
        save_plan(plan, output)
        pairs = runs(solution, controls=1)
        heads = []
        if check_heads:
            reference = run.survey.generation.latents
            assert reference is not None  # or perturbing would have failed
            for head in check(opened.pipe, choices, solution, requests[0], reference, most=check_heads):
                heads.append(head)
                progress.tell("check heads", len(heads), check_heads)
    found = calibration_result(choices, solution, heads=heads, notes=run.advice())
    result: dict[str, Any] = {"model": opened.name, "machine": opt.machine(), "command": command, "created": now()}
    if pairs:
        rows = [pair.to_dict() for pair in pairs]
        result |= quality.summarise(plan.name, pairs[0].dense.settings, rows)
        seconds_mean = result["summary"]["seconds"]["plan"]["total"]["mean"]
        found["measured"] = {
            "psnr": result["summary"]["psnr"],
            "seconds": seconds_mean,
            "density": result["summary"]["density"]["mean"],
        }
    result["plan"], result["calibration"] = plan.name, found
    _print(found)
    if json is not None:
        write_json(json, result)
    if html is not None:
        clips = [
            report.clip_of(pair.request.prompt, plan.name, pair.dense.frames, pair.planned.frames, opened.fps)
            for pair in pairs
        ]
        report.write_page(html, result, clips)
    for path in (json, html, output):
        if path is not None:
            typer.echo(f"written: {path}")
    typer.echo(f"kept: {kept} (vidaccel solve makes other plans of it in seconds)")


def _default_candidates(pipe: Any) -> CandidateSet:
    from ..calibration.candidates import load_candidates

    kind = str(getattr(pipe, "_execution_device", pipe.device)).split(":")[0]
    return load_candidates("cuda" if kind == "cuda" else "cpu")


def _print(found: Mapping[str, Any]) -> None:
    """Prediction beside measurement, and the front."""
    from rich.console import Console
    from rich.table import Table

    predicted, dense, measured = found["predicted"], found["dense"], found.get("measured")
    table = Table(title="the plan, predicted and measured on other seeds")
    for name in ("", "predicted", "measured"):
        table.add_column(name, justify="left" if not name else "right")
    seen = measured or {}
    table.add_row("density over all calls", _figure(predicted["density"]), _figure(seen.get("density")))
    table.add_row("seconds a generation", _figure(predicted["seconds"]), _figure(seen.get("seconds")))
    faster = None if not predicted["seconds"] else dense["seconds"] / predicted["seconds"]
    table.add_row("speed-up", _figure(faster), "")
    table.add_row("relative error of the final latent", _figure(predicted["error"]), "")
    table.add_row("PSNR, dB", "", _figure((seen.get("psnr") or {}).get("mean")))
    Console().print(table, front_table(found["front"]))
    if found.get("rank_correlation") is not None:
        typer.echo(f"rank correlation of predicted and measured error over heads: {found['rank_correlation']:.3f}")
    for note in found["notes"]:
        typer.echo(f"note: {note}")


def front_table(front: Sequence[Mapping[str, float | None]]) -> Any:
    """The Pareto front as a table of at most ten rows."""
    from rich.table import Table

    table = Table(title="least predicted error by cost")
    for name in ("density", "seconds", "error"):
        table.add_column(name, justify="right")
    for point in (front[i] for i in sorted({round(n * (len(front) - 1) / 9) for n in range(10)})):
        table.add_row(*(_figure(point[name]) for name in ("density", "seconds", "error")))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
