"""Sparse attention on a CUDA device: ours in every precision beside other kernels, at the shapes of video models.

Correctness comes first: 256 rows of two heads against float64 with the same roundings. A kernel that is wrong, cannot
run or runs out of memory is a row with its reason and no time. Everything that is timed for one mask takes turns,
dense attention among it, with a cold L2 cache before each call.

The *fraction of ideal* is dense time x density / our time, where dense is the fastest exact dense kernel here. The
*ceiling* is a large matrix product in the precision's formats, measured in the same run; the *bytes floor* is the time
of reading q, k, v and writing the output once at the speed of a large copy.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.errors import VidaccelError
from vidaccel.kernels import KernelRequest
from vidaccel.kernels.triton.autotune import launch_errors
from vidaccel.layout import TokenLayout
from vidaccel.types import PRECISIONS, Precision

from .ours import PLAIN, gluon_serves, kernel_of
from .peers import PEERS, Peer
from .sampled import Sample, sampled_attention, tolerance
from .shapes import FORMATS, Shape, make_mask
from .timing import Ceilings, Clock, interleaved

__all__ = ["FAILURES", "HEADER", "Deadline", "Row", "format_row", "measure_shape", "reason_of"]

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: What a kernel or a peer may fail with: such a failure is a row, not the end of the run.
FAILURES: tuple[type[Exception], ...] = (
    VidaccelError,
    RuntimeError,  # torch.OutOfMemoryError and torch.compile's errors among them
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    ImportError,
    AssertionError,
    OSError,
    *launch_errors(),
)


class Deadline:
    """How much time is left.

    Args:
        seconds: from now.
        clock: seconds since some start.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        """Seconds until it, negative after it."""
        return self.end - self._clock()

    def passed(self) -> bool:
        """Whether it is over."""
        return self.left() <= 0


@dataclass(frozen=True)
class Row:
    """One kernel on one shape and mask.

    Args:
        shape: name of the shape.
        kernel: ours, ``layout`` (tiling q, k, v and untiling the output) or a peer.
        precision: how it multiplies; ``native`` for bf16.
        mask: ``dense``, ``random`` or ``sta``.
        density: kept token pairs over all.
        tail: whether the pooled tail was computed as well.
        status: ``ok``, ``wrong`` (not timed), ``failed`` or ``skipped``.
        reason: why it is not ``ok``.
        error: relative L2 distance of the checked rows from float64; for our 8-bit precisions with the same roundings.
        seconds: median of one call.
        rounds: calls that were timed.
        tflops: attention's operations x density over the time, in 10^12 a second.
        of_ideal: dense time x density / time, ``None`` if no dense kernel ran.
        of_ceiling: operations per second over those of a large matrix product in the same formats.
        of_bytes: time of the fewest bytes over the time.
    """

    shape: str
    kernel: str
    precision: str
    mask: str
    density: float
    tail: bool
    status: str
    reason: str | None = None
    error: float | None = None
    seconds: float | None = None
    rounds: int = 0
    tflops: float | None = None
    of_ideal: float | None = None
    of_ceiling: float | None = None
    of_bytes: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Candidate:
    """A call that was found right and waits to be timed."""

    row: Row
    run: Callable[[], object]


HEADER = (
    f"{'shape':15}{'kernel':13}{'precision':10}{'mask':7}{'density':>8}{'tail':>5}{'seconds':>11}{'TFLOP/s':>9}"
    f"{'ideal':>7}{'ceiling':>8}{'bytes':>7}{'error':>9}"
)


def format_row(row: Row) -> str:
    """A line of the table under :data:`HEADER`."""
    start = (
        f"{row.shape:15}{row.kernel:13}{row.precision:10}{row.mask:7}{row.density:8.3f}{'yes' if row.tail else 'no':>5}"
    )
    if row.status != "ok" or row.seconds is None:
        return f"{start}  {row.status}: {row.reason}"

    def number(value: float | None, width: int, digits: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"

    error = f"{'-':>9}" if row.error is None else f"{row.error:9.1e}"
    return (
        f"{start}{row.seconds:11.6f}{number(row.tflops, 9, 1)}{number(row.of_ideal, 7, 2)}"
        f"{number(row.of_ceiling, 8, 2)}{number(row.of_bytes, 7, 2)}{error}"
    )


def reason_of(error: BaseException) -> str:
    """One line of an exception's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Gaussian q, k, v [1,S,H,D]; k has a mean, as real ones do.

    v has none: beside a mean, one block too many or too few among hundreds would be lost in the rounding.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    q, k, v = (
        (torch.randn(size, generator=generator, device=device, dtype=torch.float32) + mean).to(dtype)
        for mean in (0.0, 0.7, 0.0)
    )
    return q, k, v


def measure_shape(
    shape: Shape,
    *,
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings,
    densities: Sequence[float],
    masks: Sequence[str],
    precisions: Sequence[str] = FORMATS,
    peers: Sequence[Peer] = PEERS,
    deadline: Deadline,
    seconds_per_mask: float = 5.0,
    kernel: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """Every mask of one shape; yields the rows of a mask when it is done.

    Args:
        deadline: masks that would begin after it are rows that say so.
        seconds_per_mask: about how long the rounds of one mask may take.
        kernel: name of our kernel.
    """
    try:
        inputs = make_inputs(shape, device, dtype)
        layout = shape.layout(device)
    except FAILURES as error:
        yield Row(shape.name, kernel, "native", "dense", 1.0, False, "failed", reason_of(error))
        return
    cases = [("dense", 1.0)] if 1.0 in densities else []
    cases += [(kind, density) for density in densities if density < 1 for kind in masks]
    for kind, density in cases:
        if deadline.passed():
            yield Row(shape.name, kernel, "native", kind, density, False, "skipped", "the time given was over")
            continue
        try:
            mask = make_mask(kind, shape.layout(), density, shape.heads).to(device)
            case = _MaskCase(shape, layout, inputs, kind, mask, mask.density(layout))
        except FAILURES as error:
            yield Row(shape.name, kernel, "native", kind, density, False, "failed", reason_of(error))
            continue
        yield from case.measure(precisions, peers, kernel, clock, ceilings, min(seconds_per_mask, deadline.left()))
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _MaskCase:
    """All that is timed in turns for one mask."""

    shape: Shape
    layout: TokenLayout
    inputs: Inputs
    kind: str
    mask: BlockMask
    density: float

    def measure(
        self,
        precisions: Sequence[str],
        peers: Sequence[Peer],
        kernel: str,
        clock: Clock,
        ceilings: Ceilings,
        seconds: float,
    ) -> list[Row]:
        sample = Sample.of(self.layout.tokens, self.shape.heads)
        found: list[_Candidate | Row] = []
        exact_dense: list[int] = []
        for peer in peers:
            if not peer.sparse and peer.tolerance < 0.02:
                exact_dense.append(len(found))
            if peer.sparse or self.kind == "dense" or peer.tolerance < 0.02:
                found.append(self._peer(peer, sample))
        found.append(self._layout_cost())
        tails = (False,) if self.mask.is_full() else (False, True)
        for precision in (PRECISIONS[name] for name in precisions):
            # where the Gluon kernel would run, the one for every device is measured as well
            both = kernel == "triton" and gluon_serves(self.inputs[0], self.layout, precision)
            for tail, name in itertools.product(tails, (kernel, PLAIN) if both else (kernel,)):
                found.append(self._ours(name, precision, tail, sample))
        return self._timed(found, exact_dense, clock, ceilings, seconds)

    def _timed(
        self, found: list[_Candidate | Row], exact_dense: list[int], clock: Clock, ceilings: Ceilings, seconds: float
    ) -> list[Row]:
        ready = [i for i, candidate in enumerate(found) if isinstance(candidate, _Candidate)]
        calls = [candidate.run for candidate in found if isinstance(candidate, _Candidate)]
        try:
            times = dict(zip(ready, interleaved(calls, clock, seconds=max(0.0, seconds)), strict=True))
        except FAILURES as error:
            rows = [c.row if isinstance(c, _Candidate) else c for c in found]
            return [_failed(row, error) if i in ready else row for i, row in enumerate(rows)]
        dense = min((times[i] for i in exact_dense if i in times), key=statistics.median, default=None)
        rows = []
        for i, candidate in enumerate(found):
            if isinstance(candidate, Row):
                rows.append(candidate)
            else:
                rows.append(self._row(candidate.row, times[i], dense, ceilings))
        return rows

    def _row(self, row: Row, times: list[float], dense: list[float] | None, ceilings: Ceilings) -> Row:
        seconds = statistics.median(times)
        rounds = {"seconds": seconds, "rounds": len(times)}
        if row.kernel == "layout":
            return Row(**{**asdict(row), **rounds})
        rate = self.shape.operations(row.density) / seconds
        ceiling = ceilings.of(row.precision)
        ideal = None
        if dense is not None:
            ideal = statistics.median(d / s for d, s in zip(dense, times, strict=True)) * row.density
        floor = self.shape.least_bytes(self.inputs[0].dtype) / ceilings.bytes_per_second
        return Row(
            **{
                **asdict(row),
                **rounds,
                "tflops": rate / 1e12,
                "of_ideal": ideal,
                "of_ceiling": None if ceiling is None else rate / ceiling,
                "of_bytes": floor / seconds,
            }
        )

    def _blank(self, kernel: str, precision: str, tail: bool = False, dense: bool = False) -> Row:
        kind, density = ("dense", 1.0) if dense else (self.kind, self.density)
        return Row(self.shape.name, kernel, precision, kind, density, tail, "ok")

    def _peer(self, peer: Peer, sample: Sample) -> _Candidate | Row:
        blank = self._blank(peer.name, "int8" if peer.name == "sage" else "native", dense=not peer.sparse)
        reason = peer.why_not(self.inputs[0])
        if reason:
            return _with(blank, "skipped", reason)
        try:
            bound = peer.bind(*self.inputs, self.layout, self.mask)
            mask = self.mask if peer.sparse else _full_like(self.mask)
            exact = sampled_attention(*self.inputs, self.layout, mask, sample)
            return _checked(blank, bound.run, sample.of_output(bound.rows(bound.run())), exact, peer.tolerance)
        except FAILURES as error:
            return _failed(blank, error)

    def _ours(self, name: str, precision: Precision, tail: bool, sample: Sample) -> _Candidate | Row:
        blank = self._blank(name, precision.name, tail)
        q = self.inputs[0]
        kernel = kernel_of(name)
        reason = kernel.why_not(KernelRequest.of(q, precision, tail=tail))
        if reason:
            return _with(blank, "skipped", reason)

        def run() -> torch.Tensor:
            out = kernel(*self.inputs, self.layout, self.mask, precision=precision, tail=tail)
            assert isinstance(out, torch.Tensor)
            return out

        try:
            exact = sampled_attention(*self.inputs, self.layout, self.mask, sample, precision=precision, tail=tail)
            limit = tolerance(precision, q.dtype, tail)
            return _checked(blank, run, sample.of_output(run()), exact, limit)
        except FAILURES as error:
            return _failed(blank, error)

    def _layout_cost(self) -> _Candidate | Row:
        """Reordering q, k, v into tiles and the output back: what an unfused caller adds to each sparse call."""
        blank = self._blank("layout", "native")

        def run() -> torch.Tensor:
            q, _, _ = (self.layout.tile(x) for x in self.inputs)
            return self.layout.untile(q)

        try:
            if not torch.equal(run(), self.inputs[0]):
                return _with(blank, "wrong", "untiling does not undo tiling")
        except FAILURES as error:
            return _failed(blank, error)
        return _Candidate(blank, run)


def _full_like(mask: BlockMask) -> BlockMask:
    n = mask.shape[-1]
    return BlockMask.from_dense(torch.ones(n, n, dtype=torch.bool, device=mask.device))


def _checked(
    blank: Row, run: Callable[[], object], got: torch.Tensor, exact: torch.Tensor, limit: float
) -> _Candidate | Row:
    error = float((got - exact).norm() / exact.norm())
    if not error <= limit:  # NaN too
        return _with(blank, "wrong", f"relative L2 error {error:.2e}, allowed {limit:.2e}", error)
    return _Candidate(_with(blank, "ok", None, error), run)


def _with(row: Row, status: str, reason: str | None, error: float | None = None) -> Row:
    return Row(**{**asdict(row), "status": status, "reason": reason, "error": error})


def _failed(row: Row, error: BaseException) -> Row:
    return _with(row, "failed", reason_of(error))
