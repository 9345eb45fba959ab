"""``vidaccel check``: does a plan still fit, at another size, step count or with a LoRA?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import options as opt
from .inputs import Inputs
from .progress import Progress

_SHOWN = 10


def check(
    context: typer.Context,
    plan: Annotated[str, typer.Argument(help="Plan file or preset name.")],
    model: opt.Model = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line, or - for stdin.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first prompts.")] = 1,
    state: Annotated[
        Path | None,
        typer.Option(help="Observations that the plan was made from [default: those beside it, if any]."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there.", rich_help_panel=opt.OUTPUT)
    ] = None,
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
    """Score a plan's own choices again with these settings, and say which heads have drifted."""
    from ..files import write_json

    opt.check_outputs(json, read=(plan, state, prompts, image))
    chosen = opt.read_plan(plan)
    if chosen.is_dense:
        raise ConfigError(f"the plan {chosen.name!r} is dense everywhere, so there is nothing to check; give another")
    beside = Path(plan).with_suffix(".observations.safetensors") if state is None else state
    if state is not None and not state.exists():
        raise ConfigError(f"there is no observations file {state}; leave --state out to go without")
    inputs = Inputs.read(context)
    from ..calibration.observations import Observations

    made_from = Observations.load(beside) if beside.exists() else None
    ready = inputs.open()
    from ..calibration.drift import measure_drift

    with Progress() as progress:
        found = measure_drift(ready.opened.pipe, chosen, ready.requests(seed), made_from, tell=progress.tell)
    before = "not known (no observations of that calibration)" if found.then is None else f"{found.then:.3f}"
    typer.echo(
        f"{chosen.name}: mean relative error of the sparse heads {found.now:.3f} now, {before} when the plan was made;"
        f" they keep {found.density:.3f} of the token pairs"
    )
    drifted = found.drifted
    if found.then is not None:
        typer.echo(f"{len(drifted)} of {len(found.heads)} heads have drifted")
    if found.rank_correlation is not None:
        typer.echo(f"rank correlation of the errors of heads then and now: {found.rank_correlation:.3f}")
    for head in drifted[:_SHOWN]:
        low, high = head.noise
        typer.echo(
            f"  noise {low:.3g} to {high:.3g}, {head.transformer} layer {head.layer} head {head.head}: error"
            f" {head.now:.3f}, was {head.then:.3f} ({head.policy})"
        )
    if len(drifted) > _SHOWN:
        typer.echo(f"  and {len(drifted) - _SHOWN} more")
    for note in found.notes:
        typer.echo(f"note: {note}")
    if json is not None:
        write_json(json, {"plan": chosen.name, "model": ready.opened.name, **found.to_dict()})
        typer.echo(f"written: {json}")
