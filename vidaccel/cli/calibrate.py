"""``vidaccel calibrate``: watches the user's model and writes a plan of little error within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from . import budget as bud
from . import options as opt
from .calibration_tables import print_result
from .command import command_line, now
from .inputs import Inputs
from .interrupt import resumable
from .joint import CacheList, check_caches, choose_jointly, with_calls
from .linears import LinearWord, check_combination, precisions
from .progress import Progress
from .validated import Made, compared, measured
from .validation import Validation

if TYPE_CHECKING:
    from ..calibration.calibrate import Calibrator
    from ..calibration.cost import Costs
    from ..calibration.plans import Choices
    from ..calibration.solve import Solution
    from ..quality import Pair

_EFFORT = "Effort"
#: Validation runs have other seeds than those that were watched.
_OTHER_SEED = 1000
#: Prompts on which step caches are measured.
_CACHE_PROMPTS = 2


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
        typer.Option(
            min=0.0, help="Mean PSNR in dB of validation runs, searched for by running.", rich_help_panel=bud.PANEL
        ),
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
    whole_probes: Annotated[
        int,
        typer.Option(min=0, help="Generations with all layers perturbed, on several prompts.", rich_help_panel=_EFFORT),
    ] = 6,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.1, help="For everything, loading excepted.", rich_help_panel=_EFFORT)
    ] = None,
    validate: Annotated[
        int, typer.Option(min=0, help="Prompts to check the plan on, with another seed.", rich_help_panel=_EFFORT)
    ] = 2,
    check_heads: Annotated[
        int, typer.Option(min=0, help="Heads whose prediction is checked alone.", rich_help_panel=_EFFORT)
    ] = 0,
    target_gpu: bud.Gpu = None,
    caches: CacheList = None,
    linear: LinearWord = None,
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
    """Find a plan of little error within a budget, for this model, device and video size.

    Watches dense generations of the prompts, scores every candidate on the way, perturbs single layers to learn what
    an error there does to the video, times every candidate, solves, and checks its own prediction on another seed.
    Its error is close to the least there is, and not always the least: docs/CALIBRATION.md says by how much.
    """
    from ..calibration.observations import Observations
    from ..files import write_json
    from ..report import check_page_path

    budget = bud.one_budget(speedup=speedup, seconds=seconds, density=density, max_error=max_error, psnr=psnr)
    if psnr is not None and not validate:
        raise ConfigError("--psnr is found by validation runs, but --validate is 0; give at least 1")
    if output.suffix.lower() != ".safetensors":
        raise ConfigError(f"the plan {output} does not end in .safetensors; name it {output.stem}.safetensors")
    check_combination(linear, budget, target_gpu, caches)
    kept = output.with_suffix(".observations.safetensors") if state is None else state
    opt.check_outputs(output, kept, html, json, read=(prompts, candidates, image))
    check_caches(caches)
    if html is not None:
        check_page_path(html)
    if kept.exists():
        Observations.load(kept)  # here, because the model takes its time
    inputs = Inputs.read(context, last_seed=_OTHER_SEED)
    from ..calibration.candidates import load_candidates
    from ..calibration.predicted import find_gpu

    chosen = None if candidates is None else load_candidates(candidates)
    target = None if target_gpu is None else find_gpu(target_gpu).name
    ready = inputs.open()
    pipe = ready.opened.pipe
    from .. import report
    from ..calibration.cache_measure import caches_for, measure_caches
    from ..calibration.calibrate import STANDING_DENSITIES, Calibrator, Effort
    from ..calibration.closed_loop import check_heads as check
    from ..calibration.plans import Choices
    from ..calibration.summary import calibration_result, provenance
    from ..configs.artifact import save_plan
    from ..pipelines.generate import execution_device

    if chosen is None:
        kind = execution_device(pipe).type if target is None else "cuda"
        chosen = load_candidates("cuda" if kind == "cuda" else "cpu")
    minutes = float("inf") if max_minutes is None else max_minutes
    effort = Effort(
        bins, tiles=tiles, probes=probes, everywhere=whole_probes, max_minutes=minutes,
        kept_back=(0.25 if validate or check_heads else 0.0) + (0.2 if caches is not None else 0.0),
    )  # fmt: skip
    stepping, unfit = ((), {}) if caches is None else caches_for(pipe, caches)
    eight_bits = precisions(linear, pipe)
    with resumable(lambda: _kept(kept)), Progress(STANDING_DENSITIES) as progress:
        requests = ready.requests(seed)
        run = Calibrator(
            pipe, requests, chosen, kept, effort=effort, tell=progress.tell, target=target, linear=eight_bits
        )
        for policy, reason in run.dropped.items():
            progress.say(f"not a candidate: {policy} ({reason})")
        for cache, reason in unfit.items():
            progress.say(f"not a step cache for this model: {cache} ({reason})")
        costs = _watch(run, progress, None if set(stepping) - {"none"} or eight_bits else budget)
        choices = Choices(run.seen, costs, by=budget.by, linear=bool(eight_bits))
        checks = Validation(
            pipe, ready.requests(seed + _OTHER_SEED, validate) if validate else [],
            seconds=run.survey.total, left=run.left, tell=progress.tell,
        )  # fmt: skip
        if stepping:
            later = 2 * min(validate, 1) + 1
            checks.notes += measure_caches(
                pipe, run.seen, requests[:_CACHE_PROMPTS], stepping, save=lambda: run.seen.save(kept),
                tell=progress.tell, time_for=lambda count: checks.time_for(count + later),
            )  # fmt: skip
        made = _choose(choices, checks, budget, stepping, predicted=target is not None)
        origin = provenance(choices, made.solution, str(budget), command_line(prompts=False), made.predicted)
        plan = made.making.plan(made.solution, output.stem, origin)
        save_plan(plan, output)
        if made.pairs is None:
            made = replace(made, pairs=checks.run(plan))
        heads = []
        if check_heads:
            reference = run.survey.generation.latents
            assert reference is not None  # or perturbing would have failed
            each = check(pipe, choices, made.solution, requests[0], reference, most=check_heads)
            heads = checks.bounded(each, "single heads", check_heads)
    found = calibration_result(choices, made.solution, heads=heads, notes=[*run.advice(), *checks.notes])
    result: dict[str, Any] = {"model": ready.opened.name, "machine": opt.machine()}
    result |= {"command": command_line(), "created": now(), "plan": plan.name, "calibration": found}
    result |= compared(found, made, choices, plan, run.survey.total, predicted=target is not None)
    run.seen.save(kept)
    print_result(found, result.get("remarks", ()))
    if json is not None:
        write_json(json, result)
    if html is not None:
        fps = ready.opened.frame_rate(ready.arguments).fps
        clips = [
            report.clip_of(pair.request.prompt, plan.name, pair.dense.frames, pair.planned.frames, fps)
            for pair in made.pairs or ()
        ]
        report.write_page(html, result, clips)
    for path in (json, html, output):
        if path is not None:
            typer.echo(f"written: {path}")
    typer.echo(f"kept: {kept} (vidaccel solve makes other plans of it in seconds)")


def _kept(observations: Path) -> str | None:
    """What an interrupted calibration leaves."""
    if not observations.exists():
        return None
    return f"what was observed is kept in {observations}; go on from there by: {command_line()}"


def _watch(run: Calibrator, progress: Progress, bounded: bud.Budget | None) -> Costs:
    """Times, observes and perturbs, each as far as it is not in the file yet; returns the candidates' seconds.

    Args:
        bounded: the budget, if attention alone has to keep it.
    """
    brief = min(45.0, 0.1 * 60 * run.effort.max_minutes)
    if run.target is None:
        costs = run.time(budget_seconds=brief)
        progress.say(_ceiling(run, costs, bounded))
    progress.watch(run.standing)
    run.observe()
    if run.target is not None:  # some times depend on the densities that were seen
        costs = run.time()
    if run.linears is not None:
        run.time_linears(budget_seconds=brief)
    run.perturb()
    return costs


def _choose(
    choices: Choices, checks: Validation, budget: bud.Budget, stepping: Sequence[str], *, predicted: bool
) -> Made:
    """The solver's choice within the budget: of plans, or of pairs of plan and step cache, which are run.

    Args:
        stepping: the step caches that were measured, none without ``--caches``.
        predicted: whether seconds are predicted for another device.
    """
    if stepping:
        from ..calibration.cache_measure import measured_figures

        figures, notes = measured_figures(choices.seen, stepping)
        checks.notes += notes

        def means(runs: Sequence[Pair]) -> dict[str, Any]:
            return with_calls(
                measured("trial", runs[0].dense.settings, runs, predicted=predicted)[1], runs, choices.all_calls
            )

        joint = choose_jointly(choices, figures, budget, checks, means)
        checks.notes += [joint.note] if joint.note else []
        return Made(joint.pair.pairing, joint.pair.solution, joint.runs, joint)
    if budget.kind == "psnr":
        return Made(choices, *_for_psnr(choices, checks, budget.value))
    return Made(choices, budget.solve(choices), None)


def _ceiling(run: Calibrator, costs: Costs, budget: bud.Budget | None) -> str:
    """The most that plans can win, in words; with step caches or Linears it is no bound, and no budget is held to it.

    Raises:
        ConfigError: if the budget asks for more.
    """
    from ..calibration.predicted import WORTH_IT, ceiling, say_ceiling

    times = run.survey.total, run.survey.attention, costs.best_ratio
    if budget is None:
        return say_ceiling(*times)
    wanted = {"speedup": budget.value, "seconds": run.survey.total / max(budget.value, 1e-9)}.get(budget.kind)
    if wanted is not None and ceiling(*times) < max(wanted, WORTH_IT):
        raise ConfigError(
            f"{budget} asks for more than can be won at this size, {ceiling(*times):.2f}x at most; ask for less,"
            " try more frames or a higher resolution, or choose by --density"
        )
    return say_ceiling(*times)


def _for_psnr(choices: Choices, checks: Validation, target: float) -> tuple[Solution, list[Pair]]:
    """The cheapest plan that was measured to reach this PSNR, and its pairs."""
    from ..calibration.closed_loop import for_quality

    best: list[Pair] = []

    def measure(solution: Solution) -> float:
        pairs = checks.run(choices.plan(solution, "trial", {}))
        mean = sum(pair.psnr for pair in pairs) / len(pairs)
        if mean >= target:
            best[:] = pairs  # each success is cheaper than the one before
        return mean

    return for_quality(choices, measure, target, go_on=lambda: checks.another), best
