"""Generations of the systems' table: finding each system's setting on real runs, then running what is not done yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any
from unittest import mock

import torch

from vidaccel.configs.plan import HeadPolicy, Plan
from vidaccel.errors import KernelError
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import kernels, select
from vidaccel.patterns import DynamicPattern, build_pattern
from vidaccel.patterns.registry import pattern_class
from vidaccel.types import PRECISIONS

from .precision import HEAD_DIM, LAYERS, captured
from .system_knobs import SYSTEMS, WARM_UP, Calls, Try, matched, nearest, plan_of
from .system_store import Cell, Row, Store

__all__ = ["Model", "kernel_for", "measure", "protocol"]


@dataclass(eq=False)
class Model:
    """The small model, and its dense generations, made when first asked for."""

    requests: Sequence[Any]
    _dense: dict[int, Any] = field(default_factory=dict)

    @cached_property
    def pipe(self) -> Any:
        """The pipeline in float32 on the CPU."""
        from vidaccel.pipelines.demo import DEMO_DIR
        from vidaccel.pipelines.load import load_pipeline

        pipe = load_pipeline(str(DEMO_DIR), dtype=torch.float32, device=torch.device("cpu"))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def calls(self) -> Calls:
        """Captured calls to begin a search with: each noise level and each layer once."""
        return Calls(captured(torch.Generator().manual_seed(0))[:: len(LAYERS) + 1])

    def dense(self, number: int) -> Any:
        """The dense generation of a request."""
        from vidaccel.pipelines.generate import generate

        if number not in self._dense:
            self._dense[number] = generate(self.pipe, self.requests[number])
        return self._dense[number]

    def run(self, plan: Plan, number: int, kernel: str | None) -> Row:
        """Figures of one request by a plan, against its dense generation."""
        from vidaccel.pipelines.generate import generate
        from vidaccel.pipelines.patch import patch
        from vidaccel.quality import quality_figures

        exact = self.dense(number)
        session = patch(self.pipe, plan, kernel=kernel, strict=True)
        try:
            with _planning(plan) as watch:
                made = generate(self.pipe, self.requests[number])
            report = session.report()
        finally:
            session.close()
        figures = quality_figures(made, exact)
        return {
            **{name: figures[name] for name in ("psnr", "ssim", "flicker", "latent_error")},
            "density": report.density,
            "sparse_density": 1.0 if report.sparse_density is None else report.sparse_density,
            "planning_seconds": watch.seconds,
            "attention_seconds": report.attention_seconds,
            "seconds": made.seconds["total"],
            "kernels": report.kernels,
        }


def measure(
    model: Model,
    cells: Sequence[Cell],
    store: Store,
    *,
    limits: Callable[[Cell], int],
    kernel: str | None = None,
    plans: dict[str, Plan] | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Runs what is not in the store yet, density by density.

    Args:
        limits: how many prompts a cell gets.
        kernel: by name, instead of the cheapest that can run a cell's precision.
        plans: plans that are measured as they are, by the name that their cells have.
    """
    for _, group in groupby(cells, key=lambda cell: (cell.precision, cell.aimed)):
        block = list(group)
        # prompt by prompt, so that what is there of an unfinished block can be compared
        for number in range(max(map(limits, block))):
            for cell in block:
                if number < limits(cell) and not store.has(_named(cell, model, number)):
                    _measure_one(model, cell, number, store, kernel, (plans or {}).get(cell.system))
                    tell(_line(store.rows[-1], number, limits(cell)))


def _measure_one(model: Model, cell: Cell, number: int, store: Store, kernel: str | None, plan: Plan | None) -> None:
    """Adds one generation to the store, or more where a setting is searched first."""
    knob = None
    if plan is None:
        knob = nearest(_tries(model, cell, store, kernel), cell.aimed).knob
        plan = _plan(cell, knob)
    row = _named(cell, model, number)
    if not store.has(row):  # a search ends with the first prompt done
        figures = model.run(plan, number, kernel or kernel_for(plan))
        store.add({**row, "knob": knob, "policy": policies(plan), **figures})


def _line(row: Row, number: int, limit: int) -> str:
    return (
        f"{row['system']} {row['aimed']:g} {row['precision']} {number + 1}/{limit}: density"
        f" {row['sparse_density']:.3f}, PSNR {row['psnr']:.1f} dB, {row['seconds']:.0f} s"
    )


def _named(cell: Cell, model: Model, number: int) -> Row:
    request = model.requests[number]
    edition = {} if cell.edition == 1 else {"edition": cell.edition}
    return {**vars(cell), **edition, "prompt": request.prompt, "seed": request.seed}


def _tries(model: Model, cell: Cell, store: Store, kernel: str | None) -> tuple[Try, ...]:
    """The settings tried for a cell, searched now if nobody has; the run of the best one is its first prompt's."""
    system = SYSTEMS[cell.system]
    if system.low == system.high:  # nothing to search
        return (Try(system.low, cell.aimed),)
    known = store.tries(cell)
    if known:
        return known
    native = Cell(cell.system, cell.aimed, compensation=cell.compensation)
    runs: dict[float, Row] = {}

    def run(knob: float) -> float:
        plan = _plan(native, knob)
        figures = model.run(plan, 0, kernel or kernel_for(plan))
        runs[knob] = {"knob": knob, "policy": policies(plan), **figures}
        return float(runs[knob]["sparse_density"])

    tries = matched(system, cell.aimed, model.calls, run)
    store.settle(cell, tries)
    row = _named(native, model, 0)
    if not store.has(row):
        store.add({**row, **runs[nearest(tries, cell.aimed).knob]})
    return tries


def _plan(cell: Cell, knob: float) -> Plan:
    own = None if cell.compensation == "own" else cell.compensation
    return plan_of(SYSTEMS[cell.system], knob, precision=cell.precision, compensation=own)


def policies(plan: Plan) -> str:
    """What a plan's sparse rules run, in words, each once."""
    heads = dict.fromkeys(str(head) for rule in plan.rules for head in rule.policy.heads if not head.is_dense)
    return "; ".join(heads) if len(heads) < 4 else f"{len(heads)} policies"


def kernel_for(plan: Plan) -> str | None:
    """The kernel to ask for: none by name where each head gets one by itself, else the first that can run all.

    Raises:
        KernelError: if no kernel can.
    """
    heads = {head for rule in plan.rules for head in rule.policy.heads if not head.is_dense}
    requests = [_request(head) for head in heads]
    try:
        for request in requests:
            select(request)
        return None
    except KernelError:
        able = [kernel.name for kernel in kernels() if all(kernel.why_not(request) is None for request in requests)]
        if not able:
            raise
        return able[0]


def _request(head: HeadPolicy) -> KernelRequest:
    variable = build_pattern(head.pattern).variable
    precision, skip = PRECISIONS[head.precision], head.skip > 0
    return KernelRequest("cpu", torch.float32, HEAD_DIM, precision, tail=head.tail, skip=skip, variable=variable)


class _Watch:
    """Adds up the seconds inside one function, calls of itself inside it counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began, self._depth = time.perf_counter(), self._depth + 1
            try:
                return run(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - began

        return timed


@contextmanager
def _planning(plan: Plan) -> Iterator[_Watch]:
    """Times the choice of blocks by the plan's patterns, on the CPU; static ones are laid out once and not timed."""
    watch = _Watch()
    classes = {pattern_class(head.pattern) for rule in plan.rules for head in rule.policy.heads}
    with ExitStack() as undo:
        for cls in classes:
            if issubclass(cls, DynamicPattern):
                own = ("mask",) if cls.mask is not DynamicPattern.mask else ()
                for method in ("order", "choose", *own):
                    undo.enter_context(mock.patch.object(cls, method, watch.around(getattr(cls, method))))
        yield watch


def protocol(prompts: Sequence[str], seed: int) -> dict[str, Any]:
    """What must be the same for rows to stand in one table."""
    from vidaccel.pipelines.demo import DEFAULTS, DEMO_DIR

    weights = DEMO_DIR / "transformer" / "diffusion_pytorch_model.safetensors"
    return {
        "model": f"the shipped small model, weights of {weights.stat().st_size} bytes",
        "arguments": {name: value for name, value in DEFAULTS.items() if name != "fps"},
        "warm_up": WARM_UP,
        "prompts": list(prompts),
        "seed": seed,
    }
