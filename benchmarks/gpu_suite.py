"""Everything a GPU can tell in one command: correctness, speed, tuning, and one transformer step end to end.

Needs torch with CUDA and Triton, nothing else; with diffusers importable the last stage runs too. Each stage has its
share of the time, writes its JSON file as soon as it is done, and cannot stop the others by failing.

    python -m benchmarks.gpu_suite [--stages correctness attention tuning end-to-end] [--minutes 8.5] [--out FOLDER]
    python -m benchmarks.gpu_suite --dry-run
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vidaccel.files import write_json

from . import cuda_run, end_to_end, tuning
from .cuda_attention import FAILURES, HEADER, Deadline, Row, format_row, reason_of
from .gpu_correctness import CASES, check_all, line, served_by_gluon
from .ours import PLAIN, hopper, kernel_of, settle_gluon
from .shapes import DENSITIES, FORMATS, MASKS
from .timing import Ceilings, CudaClock, measure_ceilings

__all__ = ["STAGES", "Outcome", "Stage", "main", "run_stages", "shares"]

#: First what the goals are about, so that a short run has it: the shapes in order of importance.
_SHAPES = ("wan-480p-1.3b", "hunyuan", "wan-720p-1.3b", "cogvideox", "wan-480p-14b", "wan-720p-14b")


@dataclass(frozen=True)
class Stage:
    """One part of the suite.

    Args:
        name: how ``--stages`` and the files call it.
        share: of the time, when all stages run.
        plan: what it does, a line each, for ``--dry-run``.
        run: does it until the deadline; returns what goes into the file: ``ok`` says whether all was well,
            ``skipped`` that it cannot run here, ``reason`` why.
    """

    name: str
    share: float
    plan: Callable[[], list[str]]
    run: Callable[[torch.device, Deadline], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How a stage went: ``status`` is ``ok``, ``wrong`` (it found something wrong), ``failed`` (it broke) or
    ``skipped`` (it cannot run here, which is no fault)."""

    stage: str
    status: str
    seconds: float
    reason: str | None = None


def _correctness(device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """The kernel for every device first; then, where ``triton`` would take the Gluon kernel, that one."""
    verdicts = []
    mine = deadline.left() * (0.6 if hopper(device) else 1.0)
    for name, until in ((PLAIN, Deadline(mine)), ("triton", deadline)):
        if name == PLAIN:
            cases = list(CASES)
        else:
            print(settle_gluon(device, max(60.0, deadline.left() / 2)), flush=True)
            cases = [case for case in CASES if served_by_gluon(case, device)]
        print(f"{name}: {len(cases)} cases", flush=True)
        found = check_all(
            kernel_of(name), device, cases=cases, deadline=until, report=lambda v: print(line(v), flush=True)
        )
        verdicts += [(name, verdict) for verdict in found]
    bad = [f"{name}: {verdict.case.name}" for name, verdict in verdicts if verdict.status in ("wrong", "failed")]
    skipped = sum(verdict.status == "skipped" for _, verdict in verdicts)
    print(f"{len(verdicts)} cases, {len(bad)} wrong or failed, {skipped} not run")
    rows = [{"kernel": name} | verdict.to_dict() for name, verdict in verdicts]
    return {"ok": not bad, "bad": bad, "skipped_cases": skipped, "cases": rows}


def _attention(device: torch.device, deadline: Deadline) -> dict[str, Any]:
    clock = CudaClock(device)
    print(settle_gluon(device, max(60.0, deadline.left() / 4)), flush=True)
    ceilings: Ceilings = measure_ceilings(clock, device)
    print(cuda_run.ceilings_line(ceilings))
    print(HEADER)

    def report(row: Row) -> None:
        print(format_row(row), flush=True)

    rows = cuda_run.measure(
        _SHAPES,
        device=device,
        clock=clock,
        ceilings=ceilings,
        deadline=deadline,
        report=report,
        densities=DENSITIES,
        masks=MASKS,
        seconds_per_mask=2.0,
    )
    ok = not any(row.status == "wrong" for row in rows)
    return {"ok": ok, "ceilings": asdict(ceilings), "rows": [row.to_dict() for row in rows]}


def _plan_correctness() -> list[str]:
    return [
        f"{len(CASES)} cases of the triton kernel against float64: {', '.join(sorted({c.precision for c in CASES}))}"
    ]


def _plan_attention() -> list[str]:
    densities = ", ".join(f"{d:g}" for d in DENSITIES)
    return [f"{name}: {', '.join(FORMATS)} at densities {densities}, {' and '.join(MASKS)}" for name in _SHAPES]


#: In the order they run.
STAGES: tuple[Stage, ...] = (
    Stage("correctness", 0.33, _plan_correctness, _correctness),
    Stage("attention", 0.40, _plan_attention, _attention),
    Stage("tuning", 0.15, tuning.plan, tuning.run),
    Stage("end-to-end", 0.12, end_to_end.plan, end_to_end.run),
)


def shares(stages: Sequence[Stage], seconds: float) -> list[float]:
    """Seconds of each stage when only these run."""
    total = sum(stage.share for stage in stages)
    return [seconds * stage.share / total for stage in stages]


def run_stages(stages: Sequence[Stage], device: torch.device, seconds: float, folder: Path) -> list[Outcome]:
    """Runs them one after the other; time that one leaves over goes to those after it."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    all_of_it = Deadline(seconds)
    for i, stage in enumerate(stages):
        mine = shares(stages[i:], max(0.0, all_of_it.left()))[0]
        print(f"== {stage.name}: {mine:.0f} s", flush=True)
        begun = time.monotonic()
        try:
            record = stage.run(device, Deadline(mine))
            status, reason = _status(record), record.get("reason")
        except FAILURES as error:  # a stage that breaks must not take the others' results along
            record, status, reason = {"ok": False}, "failed", reason_of(error)
        outcome = Outcome(stage.name, status, time.monotonic() - begun, reason)
        write_json(folder / f"{stage.name}.json", cuda_run.environment(device) | asdict(outcome) | record)
        print(f"== {stage.name}: {status} after {outcome.seconds:.0f} s{f': {reason}' if reason else ''}", flush=True)
        outcomes.append(outcome)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return outcomes


def _status(record: dict[str, Any]) -> str:
    if record.get("skipped"):
        return "skipped"
    return "ok" if record.get("ok", True) else "wrong"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0, 1 if a stage is not ok, or 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="which parts, in their own order")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it, about")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the JSON files")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of work and end")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes:g}; give more than 0")
    stages = [stage for stage in STAGES if stage.name in args.stages]
    if args.dry_run:
        for stage, seconds in zip(stages, shares(stages, 60 * args.minutes), strict=True):
            print(f"{stage.name}: {seconds:.0f} s, {args.out / (stage.name + '.json')}")
            for text in stage.plan():
                print(f"  {text}")
        return 0
    reason = cuda_run.no_cuda()
    if reason:
        print(f"error: {reason.split(', or')[0]}", file=sys.stderr)
        return cuda_run.NO_CUDA
    device = torch.device("cuda", torch.cuda.current_device())
    outcomes = run_stages(stages, device, 60 * args.minutes, args.out)
    return 0 if all(outcome.status in ("ok", "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
