"""How long the forward kernel should take on a GPU that is not here: a prediction, never a measurement.

One step of the kernel's loop is a key piece against a query piece. Its instructions were counted in the machine code
(``step_counts.yaml``, made by ``python -m benchmarks.gate_counts``); what a multiprocessor does in a cycle is in
``hardware.yaml``. With the steps of every program from the block lists::

    step    = max(products / rate, exponentials / lanes, arithmetic / lanes, instructions / issue)    cycles
    program = steps x step + instructions outside the loop / issue
    kernel  = max(longest multiprocessor when each takes the next program of the list, bytes / bandwidth)

Limits. Units are taken to overlap perfectly and latencies to be hidden, so :attr:`Prediction.seconds` is a lower
bound of what this machine code can reach; :attr:`Prediction.without_overlap` is what it takes if no two units ever
work at once. Boost clocks are assumed, which large products do not sustain (an H200 that was measured reached 770 to
800 of its 989 bf16 TFLOP/s). Keys and values are taken to be read once; a cache that is too small reads them again.
Making 8-bit copies and block means is not included. In-kernel skipping, Q smoothing and the Hopper kernel in Gluon are
not modelled.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
import yaml

from ...blockmask import BlockMask
from ...errors import KernelError
from ...layout import TokenLayout
from ...types import Precision
from .configs import Config, choose, kind_of
from .worklist import worklist

__all__ = ["Agreement", "Hardware", "Prediction", "Step", "check", "hardware", "predict", "step_of"]


@dataclass(frozen=True)
class Hardware:
    """The best one GPU can do; a row of ``hardware.yaml``.

    Args:
        arch: compute capability, 90 for 9.0.
        name: the product these figures are of.
        multiprocessors: how many it has.
        clock: cycles a second.
        bytes_per_second: of its memory.
        products: multiply-adds of the tensor cores, a cycle and multiprocessor, by operand format.
        exponentials, arithmetic: results a cycle and multiprocessor.
        issue: instructions of a warp a cycle and multiprocessor.
        source: where the figures are from.
    """

    arch: int
    name: str
    multiprocessors: int
    clock: float
    bytes_per_second: float
    products: Mapping[str, float]
    exponentials: float
    arithmetic: float
    issue: float
    source: str


@dataclass(frozen=True)
class Step:
    """The counts of one configuration; a row of ``step_counts.yaml``.

    Args:
        config: the launch configuration.
        tail: whether the kernel was compiled with the pooled tail.
        counts: as :class:`.counting.StepCounts` has them.
    """

    arch: int
    kind: str
    head_dim: int
    tail: bool
    config: Config
    counts: Mapping[str, Any]

    def cycles(self, on: Hardware) -> dict[str, float]:
        """Cycles that each unit of a multiprocessor is busy with one step.

        Raises:
            KernelError: if the hardware has no rate for an operand format.
        """
        products: Mapping[str, float] = self.counts["products"]
        lacking = [name for name in products if name not in on.products]
        if lacking:
            raise KernelError(f"{on.name} has no tensor-core rate for {', '.join(lacking)}; add it to hardware.yaml")
        return {
            "tensor cores": sum(count / on.products[name] for name, count in products.items()),
            "exponentials": 32 * self.counts["exponentials"] / on.exponentials,
            "arithmetic": 32 * self.counts["arithmetic"] / on.arithmetic,
            "issue": self.counts["issued"] / on.issue,
        }


@dataclass(frozen=True)
class Prediction:
    """A predicted time.

    Args:
        seconds: of one forward, all units overlapping perfectly.
        without_overlap: the same if they never overlap.
        limit: what it waits for: a unit of :meth:`Step.cycles`, ``memory`` or ``balance`` (one long list).
        cycles: of each unit for one step.
        steps: of all programs.
        config: the launch configuration.
        how: from what it was made, in words.
        predicted: always ``True``; measured times are of another type.
    """

    seconds: float
    without_overlap: float
    limit: str
    cycles: Mapping[str, float]
    steps: int
    config: Config
    how: str
    predicted: bool = True


@dataclass(frozen=True)
class Agreement:
    """Predictions beside measurements.

    Args:
        pairs: how many.
        median: of measured over predicted seconds; 1 is exact, more is slower than predicted.
        least, most: of the same.
        within: share of the pairs that lie between ``seconds`` and ``without_overlap``.
        rank: share of the pairs of pairs that are in the right order, what a plan needs most; 1 with fewer than two.
    """

    pairs: int
    median: float
    least: float
    most: float
    within: float
    rank: float


@cache
def _hardware() -> tuple[Hardware, ...]:
    return tuple(Hardware(**row) for row in _rows("hardware.yaml"))


@cache
def _steps() -> tuple[Step, ...]:
    return tuple(Step(**{**row, "config": Config(**row["config"])}) for row in _rows("step_counts.yaml"))


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = yaml.safe_load(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
    return rows


def hardware(arch: int) -> Hardware:
    """The GPU that stands for an architecture.

    Raises:
        KernelError: if there is none.
    """
    found = next((row for row in _hardware() if row.arch == arch), None)
    if found is None:
        known = ", ".join(str(row.arch) for row in _hardware())
        raise KernelError(f"nothing is known about sm_{arch}; known are {known}")
    return found


def step_of(arch: int, kind: str, head_dim: int, config: Config, *, tail: bool) -> Step:
    """The counts of a shipped configuration; those for the next larger head dim of the table where there is none.

    Raises:
        KernelError: if it was not counted.
    """
    fits = [
        step
        for step in _steps()
        if (step.arch, step.kind, step.tail, step.config) == (arch, kind, tail, config) and step.head_dim >= head_dim
    ]
    if not fits:
        raise KernelError(
            f"{config} was not counted for sm_{arch} {kind} {head_dim}; run python -m benchmarks.gate_counts"
        )
    return min(fits, key=lambda step: step.head_dim)


def predict(
    arch: int,
    precision: Precision,
    head_dim: int,
    layout: TokenLayout,
    *,
    heads: int,
    batch: int = 1,
    mask: BlockMask | None = None,
    density: float | None = None,
    tail: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    on: Hardware | None = None,
) -> Prediction:
    """Seconds of one forward of the kernel with its shipped configuration.

    Args:
        arch: compute capability, 90 for 9.0.
        head_dim: channels of one head.
        heads, batch: H and B.
        mask: the kept blocks; or
        density: the same share of the key pieces for every program.
        tail: whether the pooled tail is on; with ``density`` each program gets the pieces of all means.
        dtype: of q, k and v.
        on: the GPU, ``None`` for the one of ``hardware.yaml``.

    Raises:
        KernelError: if nothing is known about the architecture or the configuration, or not exactly one of ``mask``
            and ``density`` is given.
    """
    if (mask is None) == (density is None):
        raise KernelError("a prediction needs either a mask or a density, not both and not neither")
    if density is not None and not 0 < density <= 1:
        raise KernelError(f"density is {density}; valid is above 0 and at most 1")
    on = hardware(arch) if on is None else on
    kind = kind_of(dtype, precision)
    config = choose(arch, kind, head_dim, int(layout.block_sizes.max()))
    step = step_of(arch, kind, head_dim, config, tail=tail)
    if mask is not None:
        work = worklist(mask, layout, batch, heads, config.block_m, config.block_n, tail=tail)
        steps = work.kv_num.expand(batch, heads, -1).flatten().tolist()
    else:
        steps = _even_steps(layout, config, float(density or 0.0), batch * heads, tail)
    cycles = step.cycles(on)
    outside = step.counts["outside"] / on.issue
    traffic = _bytes(layout.tokens, batch * heads * head_dim, precision, dtype)
    overlapped = _makespan(steps, max(cycles.values()), outside, on.multiprocessors) / on.clock
    alone = _makespan(steps, sum(cycles.values()) - cycles["issue"], outside, on.multiprocessors) / on.clock
    memory = traffic / on.bytes_per_second
    limit = max(cycles, key=lambda unit: cycles[unit])
    even = (sum(steps) * max(cycles.values()) + len(steps) * outside) / on.multiprocessors / on.clock
    if overlapped > 1.25 * even:
        limit = "balance"
    if memory > overlapped:
        limit = "memory"
    return Prediction(
        seconds=max(overlapped, memory),
        without_overlap=max(overlapped, alone, memory),
        limit=limit,
        cycles=cycles,
        steps=int(sum(steps)),
        config=config,
        how=f"instructions of sm_{arch} machine code, rates of {on.name}",
    )


def check(pairs: Iterable[tuple[Prediction, float]]) -> Agreement:
    """How predictions compare with measured seconds of the same calls.

    Raises:
        KernelError: without any pair.
    """
    found = list(pairs)
    if not found:
        raise KernelError("there is nothing to compare the cost model with; measure on a GPU first")
    ratios = [seconds / prediction.seconds for prediction, seconds in found]
    between = sum(p.seconds <= seconds <= p.without_overlap for p, seconds in found)
    ordered = [
        (a.seconds < b.seconds) == (x < y) for i, (a, x) in enumerate(found) for b, y in found[i + 1 :] if x != y
    ]
    return Agreement(
        pairs=len(found),
        median=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        within=between / len(found),
        rank=sum(ordered) / len(ordered) if ordered else 1.0,
    )


def _even_steps(layout: TokenLayout, config: Config, density: float, heads: int, tail: bool) -> list[float]:
    sizes = layout.block_sizes

    def pieces(most: int) -> int:
        return int(((sizes + most - 1) // most).sum())

    each = max(1.0, density * pieces(config.block_n))
    if tail and density < 1:
        each += -(-layout.num_blocks // config.block_n)
    return [each] * (heads * pieces(config.block_m))


def _makespan(steps: Sequence[float], step: float, outside: float, multiprocessors: int) -> float:
    """Cycles until the last multiprocessor is done, when each takes the next program, longest first."""
    free = [0.0] * multiprocessors
    for count in sorted(steps, reverse=True):
        heapq.heapreplace(free, free[0] + count * step + outside)
    return max(free)


def _bytes(tokens: int, channels: int, precision: Precision, dtype: torch.dtype) -> float:
    """Bytes that must cross the memory bus: q, k and v once in, the output once out."""
    narrow = 1 if precision.qk != "native" else dtype.itemsize
    values = 1 if precision.pv == "fp8" else dtype.itemsize
    return float(tokens * channels * (2 * narrow + values + dtype.itemsize))
