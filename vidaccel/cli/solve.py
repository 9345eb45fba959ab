"""``vidaccel solve``: other plans from observations that are there already, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import budget as bud
from . import options as opt
from .calibration_tables import cache_table, front_table
from .command import command_line
from .console import show
from .joint import CacheList


def solve(
    observations: Annotated[Path, typer.Argument(help="File that vidaccel calibrate kept.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The plan file.", rich_help_panel=opt.OUTPUT)
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.", rich_help_panel=opt.OUTPUT)
    ] = None,
    speedup: bud.Speedup = None,
    seconds: bud.Seconds = None,
    density: bud.Density = None,
    max_error: bud.MaxError = None,
    gpu: bud.Gpu = None,
    caches: CacheList = None,
) -> None:
    """Solve stored observations for a budget: another plan in seconds. Without a budget, show the whole front."""
    from ..files import write_json

    opt.check_outputs(output, json)
    for path in (output, json):
        if path is not None and path.resolve() == observations.resolve():
            raise ConfigError(f"{path} is the observations themselves; give the output another name")
    given = {"speedup": speedup, "seconds": seconds, "density": density, "max_error": max_error}
    wanted = any(value is not None for value in given.values())
    if output is not None and output.suffix.lower() != ".safetensors":
        raise ConfigError(f"the plan {output} does not end in .safetensors; name it {output.stem}.safetensors")
    if output is not None or wanted or caches is not None:
        budget = bud.one_budget(**given)
    from ..calibration.cache_measure import stored_figures
    from ..calibration.caching import Pairing, best_pairs, told
    from ..calibration.cost import Costs
    from ..calibration.observations import Observations
    from ..calibration.plans import Choices
    from ..calibration.predicted import costs_on
    from ..calibration.summary import calibration_result, cost_notes, front_points, provenance
    from ..configs.artifact import save_plan

    seen = Observations.load(observations)
    if gpu is not None:
        costs: Costs | None = costs_on(gpu, seen)
    else:
        costs = Costs.from_dict(seen.costs) if seen.costs else None
    if not wanted:
        choices = Choices(seen, costs, by="density")
        front = front_points(choices)
        show(front_table(front, str(choices.costs_told["seconds"])))
        if json is not None:
            write_json(json, {"front": front, "costs": choices.costs_told})
            typer.echo(f"written: {json}")
        return
    # Linears and step caches are not chosen together, as in vidaccel calibrate
    choices = Choices(seen, costs, by=budget.by, linear=caches is None)
    if caches is None:
        making: Choices | Pairing = choices
        solution, joint = budget.solve(choices), None
        predicted = choices.predict(solution)
    else:
        measured = stored_figures(seen, caches)
        pairs, reasons = best_pairs(choices, measured, budget.kind, budget.value)
        making, solution, predicted = pairs[0].pairing, pairs[0].solution, pairs[0].predicted
        joint = told(measured, pairs, pairs[0], reasons)
        show(cache_table(joint))
    times = ""
    if predicted.total is not None:
        times = f", {predicted.total:.3g} of {choices.dense_seconds:.3g} {choices.costs_told['seconds']}"
    typer.echo(f"{budget}: density {predicted.density:.3f}{times}, predicted latent error {predicted.error:.3g}")
    for note in cost_notes(choices, predicted):
        typer.echo(f"note: {note}")
    if json is not None:
        found = calibration_result(choices, solution)
        if joint is not None:
            found |= {"predicted": predicted.to_dict(), "chosen": predicted.to_dict(), "caches": joint}
        write_json(json, found)
        typer.echo(f"written: {json}")
    if output is not None:
        command = command_line(prompts=False)
        origin = provenance(choices, solution, str(budget), command, predicted)
        save_plan(making.plan(solution, output.stem, origin), output)
        typer.echo(f"written: {output}")
