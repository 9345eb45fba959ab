"""Linears in a calibration: watched in its dense generations, run kind by kind, and timed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..configs.linear import LinearPlan, LinearRule
from ..configs.plan import Plan
from ..engine.runs import Moment
from ..engine.session import Session
from ..errors import ConfigError
from ..linear.measure import LinearErrors, watch_linears
from ..linear.places import LinearPlace, linear_places, stacks_of
from ..linear.quantise import check_linear, swap_weight
from ..linear.support import why_not_linear, why_not_table
from ..pipelines.generate import Request, execution_device, generate
from ..pipelines.patch import find_transformers, patch
from .bench import Run, rounds
from .cost import device_name
from .cost_store import CostStore
from .linear_table import LinearTable, cost_key
from .observations import Observations
from .sensitivity import latent_change

__all__ = ["LinearStage", "measure_linears", "precisions_for", "time_linears"]

#: Tokens of a call that is timed on a CPU; larger ones are as much slower as they are larger.
_CPU_TOKENS = 512
_ROUNDS = 9


def precisions_for(word: str, device: torch.device) -> tuple[str, ...]:
    """The precisions of ``--linear``: a name, or ``auto`` for all that run on the device.

    Raises:
        ConfigError: if the word is none of these, torchao is missing, or nothing runs.
        KernelError: if the named one cannot run.
    """
    table = why_not_table(device)
    if word == "auto":
        found = tuple(precision for precision, reason in table.items() if reason is None)
        if not found:
            raise ConfigError(f"no precision of Linears runs here: {'; '.join(filter(None, table.values()))}")
        return found
    if word not in table:
        raise ConfigError(f"--linear is {word!r}; valid are {', '.join(table)}, auto")
    check_linear(LinearPlan.uniform(word), device)
    return (word,)


class LinearStage:
    """What a calibration does about Linears.

    Args:
        pipe: the pipeline.
        seen: where what is found goes, into its table of Linears.
        precisions: what may be chosen.
        device: where the model computes.

    Raises:
        ConfigError: if no Linear can have any of the precisions.
    """

    def __init__(self, pipe: Any, seen: Observations, precisions: Sequence[str], device: torch.device) -> None:
        self.pipe, self.seen, self.device = pipe, seen, device
        self._places = _places(pipe, precisions, device)
        numbers = {
            name: _sites([path for path, _ in family.attention_layers(model)])
            for name, model, family in find_transformers(pipe)
        }
        self._sites = [
            numbers[name].get((place.module.split(".*.")[0], place.layer)) for name, place, _ in self._places
        ]
        if seen.linears is None or seen.linears.precisions != tuple(precisions):
            seen.linears = LinearTable(tuple(precisions))
        self.table = seen.linears

    @contextmanager
    def watching(self, session: Session, steps: Sequence[int]) -> Iterator[None]:
        """While the block runs, one generation, errors are measured in these steps; calls are counted in all."""
        wanted = frozenset(steps)

        def now() -> int | None:
            moment = _moment(session)
            return None if moment is None or moment.step not in wanted else self.seen.bin_of(moment.noise_level)

        with watch_linears(self._places, self.seen.bins, now) as found:
            yield
        for errors, site in zip(found, self._sites, strict=True):
            errors.site = site
        self.table.add(found)

    def watch_alone(self, request: Request, steps: Sequence[int]) -> None:
        """One more dense generation, where those that were observed did not look at Linears."""
        session = patch(self.pipe, Plan.dense())
        try:
            with self.watching(session, steps):
                generate(self.pipe, request)
        finally:
            session.close()

    def missing(self) -> list[tuple[str, str]]:
        """(precision, kind) that were not run yet."""
        pairs = [(precision, kind) for precision in self.table.precisions for kind in self.table.kinds(precision)]
        return [(precision, kind) for precision, kind in pairs if kind not in self.table.changes.get(precision, {})]

    def run(self, precision: str, kind: str, request: Request, reference: torch.Tensor) -> float:
        """One generation with all Linears of a kind in a precision, everything else dense; keeps how far it is off.

        Args:
            reference: the latent of the dense run.
        """
        modules = tuple(dict.fromkeys(item.module for item in self.table.items if item.kind == kind))
        rule = LinearRule(precision, modules)
        plan = Plan(f"{kind} in {precision}", linear=LinearPlan((rule,)))
        change = latent_change(self.pipe, plan, request, reference)
        self.table.changes.setdefault(precision, {})[kind] = change
        return change

    def time(self, cache: Path | None, budget_seconds: float) -> None:
        """Seconds of a call of each size, as the model makes it and in each precision."""
        self.table.seconds = time_linears(self.table, self.device, cache=cache, budget_seconds=budget_seconds)


def measure_linears(pipe: Any, requests: Sequence[Request], precision: str, *, bins: int = 5) -> list[LinearErrors]:
    """The error of every Linear in every step of dense generations, without the rest of a calibration.

    Args:
        pipe: an unpatched pipeline.
        precision: ``"int8"`` or ``"fp8"``.
        bins: noise bins of equal width.

    Raises:
        ConfigError: if torchao is missing, or no Linear can have this precision.
        KernelError: if the device cannot compute it.
    """
    device = execution_device(pipe)
    places = _places(pipe, precisions_for(precision, device), device)
    session = patch(pipe, Plan.dense())

    def now() -> int | None:
        moment = _moment(session)
        return None if moment is None else min(bins - 1, int(moment.noise_level * bins))

    try:
        with watch_linears(places, bins, now) as found:
            for request in requests:
                generate(pipe, request)
    finally:
        session.close()
    return found


def _places(pipe: Any, precisions: Sequence[str], device: torch.device) -> list[tuple[str, LinearPlace, Sequence[str]]]:
    """Linears of all transformers that can have one of the precisions, and which."""
    found: list[tuple[str, LinearPlace, Sequence[str]]] = []
    reason = "there is none in the blocks"
    for name, model, family in find_transformers(pipe):
        for place in linear_places(model, stacks_of(family.layers)):
            reasons = {p: place.kept or why_not_linear(place.linear, p, device) for p in precisions}
            can = [precision for precision, why in reasons.items() if why is None]
            reason = next(filter(None, reasons.values()), reason)
            if can:
                found.append((name, place, can))
    if not found:
        raise ConfigError(f"no Linear can be quantised here: {reason}")
    return found


def _moment(session: Session) -> Moment | None:
    """Where the forward pass stands that runs in this thread, or ``None`` outside of one."""
    contexts = (site.transformer.context for site in session.sites)
    return next((context.moment for context in contexts if context is not None), None)


def _sites(paths: Sequence[str]) -> dict[tuple[str, int], int]:
    """(stack, number in it) -> number of the attention layer."""
    found = {}
    for number, path in enumerate(paths):
        match = re.match(r"(.+?)\.(\d+)\.", path)
        if match:
            found[match[1], int(match[2])] = number
    return found


def time_linears(
    table: LinearTable, device: torch.device, *, cache: Path | None, budget_seconds: float
) -> dict[str, dict[str, float]]:
    """Times every distinct Linear on random data, natively and quantised in turns.

    A quantised call's seconds are the median of its ratios to the native call before, times the median of the native
    ones. Calls of more than 512 tokens are timed with 512 on a CPU and multiplied.

    Args:
        cache: folder where times are kept, see :func:`.cost_store.cost_cache`; ``None`` keeps nothing.
        budget_seconds: no new round begins that would not end within it, shared by all sizes; each gets one.
    """
    sizes: dict[str, tuple[LinearErrors, set[str]]] = {}
    for item in table.items:
        sizes.setdefault(cost_key(item), (item, set()))[1].update(item.error)
    stored = None if cache is None else CostStore(cache, device_name(device))
    found = {}
    for key, (item, precisions) in sizes.items():
        # the versions that the store itself notes are not torchao's
        name = f"linear, {key}, torchao {metadata.version('torchao')}"
        known = {} if stored is None else stored.read(name)
        times = known.get("policies", {})
        if not known or set(times) < precisions:
            native, times = _time(item, sorted(precisions), device, budget_seconds / len(sizes))
            known = {"dense": native, "mixing": None, "policies": times}
            if stored is not None:
                stored.write(name, known)
        found[key] = {"native": known["dense"], **{p: times[p] for p in sorted(precisions)}}
    return found


def _time(
    item: LinearErrors, precisions: Sequence[str], device: torch.device, budget: float
) -> tuple[float, dict[str, float]]:
    rows = max(1, round(item.rows))
    count = min(rows, _CPU_TOKENS) if device.type == "cpu" else rows
    linears: dict[str, nn.Linear] = {}
    for precision in ("native", *precisions):
        made = nn.Linear(item.size[1], item.size[0], bias=item.bias, device=device, dtype=item.dtype)
        linears[precision] = made.requires_grad_(False)
        if precision != "native":
            swap_weight(made, precision, cost_key(item))
    x = torch.randn(count, item.size[1], device=device, dtype=item.dtype)
    runs = {precision: Run(partial(linear, x)) for precision, linear in linears.items()}
    with torch.no_grad():
        native, ratios = rounds(runs.pop("native"), list(runs.values()), device, budget, _ROUNDS)
    one = max(native, 1e-9) * rows / count
    return one, {precision: one * ratio for precision, ratio in zip(runs, ratios, strict=True)}
