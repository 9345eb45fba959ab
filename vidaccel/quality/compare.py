"""Dense against a plan, prompt by prompt, with the same seed: quality, seconds by stage, and two controls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..configs.plan import Plan
from ..engine.stats import Report
from ..errors import ConfigError
from ..pipelines.caches import Cache, enabled
from ..pipelines.generate import Generation, Request, generate, num_steps
from ..pipelines.patch import patch
from .coverage import coverage
from .figures import FIGURES, RANGES, quality_figures
from .metrics import mean_interval
from .plausible import most_by_attention, on_dense, on_gain
from .verdict import verdicts

__all__ = [
    "ANOTHER_PROMPT",
    "CONTROLS",
    "DENSE_AGAIN",
    "ONE_STEP_FEWER",
    "Pair",
    "measure_pair",
    "measure_pairs",
    "run_settings",
    "summarise",
    "warm_up",
]

#: Names of the controls; the first two are runs of their own.
DENSE_AGAIN = "dense again"
ONE_STEP_FEWER = "dense, one step fewer"
ANOTHER_PROMPT = "dense, another prompt"
CONTROLS = (DENSE_AGAIN, ONE_STEP_FEWER)

_WARM_UP_STEPS = 2
_RANGES = {**RANGES, "density": (0.0, 1.0), "sparse_density": (0.0, 1.0)}


@dataclass(frozen=True)
class Pair:
    """One prompt, dense and by the plan.

    Args:
        request: what both generated.
        dense, planned: what came out.
        quality: figures of the plan's video against the dense one, by the names of `FIGURES`.
        report: what ran sparse in the plan's run.
        controls: the same figures of other dense runs against the dense one, by the name of the control.
        dense_attention: seconds of self-attention in the dense run, from its share of a control run; ``None`` without
            that control.
        dense_runs: seconds of each dense run of this request, the control included.
    """

    request: Request
    dense: Generation
    planned: Generation
    quality: Mapping[str, float | None]
    report: Report
    controls: Mapping[str, Mapping[str, float | None]]
    dense_attention: float | None
    dense_runs: Sequence[float]

    @property
    def psnr(self) -> float:
        """PSNR of the plan's video against the dense one, in dB."""
        return _known(self.quality["psnr"])

    @property
    def ssim(self) -> float:
        """The same for SSIM."""
        return _known(self.quality["ssim"])

    @property
    def speedup(self) -> float:
        """Seconds of the whole dense call over those of the plan's."""
        return self.dense.seconds["total"] / self.planned.seconds["total"]

    @property
    def denoise_speedup(self) -> float:
        """The same for the denoising alone."""
        return self.dense.seconds["denoise"] / self.planned.seconds["denoise"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "prompt": self.request.prompt,
            "seed": self.request.seed,
            **self.quality,
            "density": self.report.density,
            "sparse_density": self.report.sparse_density,
            "speedup": {"total": self.speedup, "denoise": self.denoise_speedup},
            "seconds": {
                "dense": {**self.dense.seconds, "attention": self.dense_attention},
                "plan": {**self.planned.seconds, "attention": self.report.attention_seconds},
            },
            "dense_runs": list(self.dense_runs),
            "controls": {name: dict(figures) for name, figures in self.controls.items()},
            "report": self.report.to_dict(),
        }


def measure_pairs(
    pipe: Any,
    plan: Plan,
    requests: Sequence[Request],
    *,
    controls: int | None = None,
    repeats: int = 1,
    **patching: Any,
) -> Iterator[Pair]:
    """Yields one `Pair` a request, as soon as it is measured; warm up first.

    From the second on, pairs also hold the control `ANOTHER_PROMPT`: how far the dense video of the request before is
    from theirs. It costs no run.

    Args:
        controls: how many of the requests get the control runs, which take two more dense runs; ``None`` = all.
        repeats, patching: see `measure_pair`.
    """
    before: Pair | None = None
    for number, request in enumerate(requests):
        wanted = CONTROLS if controls is None or number < controls else ()
        pair = measure_pair(
            pipe, plan, request, controls=wanted, repeats=repeats, plan_first=number % 2 == 1, **patching
        )
        if before is not None and before.request.prompt != request.prompt and _same_size(before, pair):
            another = quality_figures(before.dense, pair.dense)
            pair = replace(pair, controls={**pair.controls, ANOTHER_PROMPT: another})
        before = pair
        yield pair


def measure_pair(
    pipe: Any,
    plan: Plan,
    request: Request,
    *,
    controls: Sequence[str] = CONTROLS,
    repeats: int = 1,
    plan_first: bool = False,
    cache: Cache | None = None,
    **patching: Any,
) -> Pair:
    """Generate ``request`` dense and by ``plan``, and measure the difference; the pipeline is left unpatched.

    Args:
        controls: the control runs to make, of `CONTROLS`.
        repeats: how often each is run; the fastest run of each counts, since what disturbs a run only slows it down.
        plan_first: which begins. The two change places from repeat to repeat, so that a machine that warms up or
            throttles favours neither.
        cache: a step cache that the plan's runs have beside it; dense runs never have one.
        patching: passed on to ``vidaccel.patch``.

    Raises:
        VidaccelError: whatever ``vidaccel.patch`` and `generate` raise.
    """
    dense: list[Generation] = []
    planned: list[tuple[Generation, Report]] = []
    for number in range(2 * repeats):
        if (number % 4 in (1, 2)) == plan_first:  # dense, plan, plan, dense, ...
            dense.append(generate(pipe, request))
        else:
            planned.append(_patched(pipe, plan, request, cache, **patching))
    best = min(dense, key=lambda run: run.seconds["total"])
    best_planned, report = min(planned, key=lambda run: run[0].seconds["total"])
    figures, again = _controls(pipe, request, best, controls)
    # a share, because seconds of two runs do not compare on a machine that is not idle
    share = None if again is None else again[1].attention_seconds / again[0].seconds["total"]
    return Pair(
        request=request,
        dense=best,
        planned=best_planned,
        quality=quality_figures(best_planned, best),
        report=report,
        controls=figures,
        dense_attention=None if share is None else min(share * best.seconds["total"], best.seconds["denoise"]),
        dense_runs=[run.seconds["total"] for run in (*dense, *(() if again is None else again[:1]))],
    )


def warm_up(pipe: Any, plan: Plan, request: Request, *, cache: Cache | None = None, **patching: Any) -> None:
    """One short run dense and one by the plan, so that no measured run pays for first-time work.

    Two steps are enough: what is prepared once depends on shapes, not on noise levels.
    """
    if num_steps(pipe, request) is not None:
        request = replace(request, arguments={**request.arguments, "num_inference_steps": _WARM_UP_STEPS})
    generate(pipe, request)
    _patched(pipe, plan, request, cache, **patching)


def _patched(
    pipe: Any, plan: Plan, request: Request, cache: Cache | None = None, **patching: Any
) -> tuple[Generation, Report]:
    session = patch(pipe, plan, **patching)
    try:
        with enabled(pipe, cache, num_steps(pipe, request)):
            generation = generate(pipe, request)
        return generation, session.report()
    finally:
        session.close()


def _controls(
    pipe: Any, request: Request, dense: Generation, wanted: Sequence[str]
) -> tuple[dict[str, dict[str, float | None]], tuple[Generation, Report] | None]:
    """Quality figures of further dense runs against ``dense``, and the run of `DENSE_AGAIN`, if it is wanted.

    `DENSE_AGAIN` goes through the patched code with the dense plan. It must come out bit-identical wherever the
    device's kernels are deterministic; where it does not, that is the noise floor. `ONE_STEP_FEWER` says what a small,
    accepted change of settings costs: a scale to read the plan's figures by.
    """
    figures: dict[str, dict[str, float | None]] = {}
    again = None
    if DENSE_AGAIN in wanted:
        again = _patched(pipe, Plan.dense(), request)
        figures[DENSE_AGAIN] = quality_figures(again[0], dense)
    steps = num_steps(pipe, request)
    if ONE_STEP_FEWER in wanted and steps is not None and steps > 1:
        fewer = replace(request, arguments={**request.arguments, "num_inference_steps": steps - 1})
        figures[ONE_STEP_FEWER] = quality_figures(generate(pipe, fewer), dense)
    return figures, again


def _known(figure: float | None) -> float:
    assert figure is not None, "PSNR and SSIM are measured everywhere"
    return figure


def _same_size(a: Pair, b: Pair) -> bool:
    """Whether the dense videos can be compared; sizes differ where a request has its own."""
    return a.dense.frames.shape == b.dense.frames.shape


def run_settings(run: Generation, plan: Plan, cache: Cache | None = None) -> dict[str, Any]:
    """The settings of a run, and what else the plan's runs of a comparison have beside attention.

    Args:
        cache: the step cache that stands in for the plan's own.
    """
    linear = None if plan.linear is None else str(plan.linear)
    return {**run.settings, "cache": plan.cache if cache is None else str(cache), "linear": linear}


def summarise(
    plan: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, dense_runs: Sequence[float] = ()
) -> dict[str, Any]:
    """All figures of a comparison, JSON-able: settings once, prompts, means with 95% confidence intervals, verdict.

    ``remarks`` are what has to be said about timings, see :mod:`.plausible`.

    Args:
        plan: the plan's name.
        settings: `run_settings` of any of the runs.
        rows: `Pair.to_dict` of each pair.
        dense_runs: seconds of further dense runs at these settings, in the same command.

    Raises:
        ConfigError: there is no pair.
    """
    if not rows:
        raise ConfigError("there is nothing to compare: no prompt was given; add prompts")
    common = {key: value for key, value in settings.items() if key not in ("prompt", "seed")}
    summary = _means(rows)
    dense = summary["seconds"]["dense"]
    summary["most_by_attention"] = most_by_attention(dense["attention"]["mean"], dense["total"]["mean"])
    return {
        "plan": plan,
        "settings": common,
        "prompts": list(rows),
        "summary": summary,
        "verdict": verdicts(summary, rows, (*CONTROLS, ANOTHER_PROMPT)),
        "remarks": _remarks(summary, common, [*dense_runs, *(run for row in rows for run in row["dense_runs"])]),
        "coverage": coverage([row["report"] for row in rows]),
    }


def _remarks(summary: Mapping[str, Any], settings: Mapping[str, Any], dense_runs: Sequence[float]) -> list[str]:
    others = [name for name, key in (("its step cache", "cache"), ("its 8-bit Linears", "linear")) if settings.get(key)]
    gain = on_gain(summary["speedup"]["total"]["mean"], summary["most_by_attention"], others=others)
    return [*gain, *on_dense(dense_runs)]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(*path: str) -> dict[str, Any]:
        figures = [figure for row in rows if (figure := _at(row, path)) is not None]
        return mean_interval(figures, _RANGES.get(path[-1], (0.0, math.inf))).to_dict()  # the others are seconds

    stages = rows[0]["seconds"]["plan"]
    return {
        **{name: mean(name) for name in FIGURES},
        "density": mean("density"),
        "sparse_density": mean("sparse_density"),
        "speedup": {part: mean("speedup", part) for part in ("total", "denoise")},
        "seconds": {run: {stage: mean("seconds", run, stage) for stage in stages} for run in ("dense", "plan")},
        "controls": {
            name: {figure: mean("controls", name, figure) for figure in FIGURES}
            for name in (*CONTROLS, ANOTHER_PROMPT)
            if any(name in row["controls"] for row in rows)
        },
    }


def _at(row: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
