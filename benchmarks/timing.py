"""Times on a CUDA device: calls take turns, with a cold cache before each, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Ceilings", "Clock", "CudaClock", "WallClock", "interleaved", "measure_ceilings"]

Call = Callable[[], object]


class Clock(Protocol):
    """Times one call in seconds."""

    def __call__(self, call: Call) -> float:
        """Runs the call once."""


class CudaClock:
    """CUDA events around the call; before it, memory larger than the L2 cache is overwritten.

    Args:
        device: the CUDA device.
        flush_bytes: how much is overwritten, 0 for a warm cache.
    """

    def __init__(self, device: torch.device, flush_bytes: int = 256 << 20) -> None:
        self.device = device
        self.flush = torch.empty(flush_bytes, dtype=torch.int8, device=device) if flush_bytes else None

    def __call__(self, call: Call) -> float:
        """Seconds on the device from the call's first kernel to its last."""
        if self.flush is not None:
            self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class WallClock:
    """Wall-clock seconds, for machines without a CUDA device."""

    def __call__(self, call: Call) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def interleaved(
    calls: Sequence[Call], clock: Clock, *, seconds: float, least: int = 3, most: int = 20, warmups: int = 2
) -> list[list[float]]:
    """Seconds of each call in each round, all calls once a round.

    Args:
        seconds: about how long all rounds together may take; the number of rounds follows from the first ones.
        least: fewest rounds, whatever they take.
        most: most rounds.
        warmups: rounds that are thrown away.
    """
    times: list[list[float]] = [[] for _ in calls]
    begun = time.perf_counter()
    for _ in range(warmups):
        begun = time.perf_counter()
        for call in calls:
            clock(call)
    one = max(1e-9, time.perf_counter() - begun)
    for _ in range(max(least, min(most, int(seconds / one) - warmups))):
        for call, found in zip(calls, times, strict=True):
            found.append(clock(call))
    return times


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run, to set attention beside.

    Args:
        bf16: operations per second of a large bf16 matrix product.
        fp8: likewise in float8_e4m3fn, ``None`` where torch cannot multiply it.
        int8: likewise in int8, ``None`` where torch cannot.
        bytes_per_second: bytes read and written by a large copy.
        missing: why a figure is ``None``.
    """

    bf16: float
    fp8: float | None
    int8: float | None
    bytes_per_second: float
    missing: tuple[str, ...] = ()

    def of(self, precision: str) -> float | None:
        """The ceiling of a precision: half of the operations are QK^T, half PV, each in its own format.

        Returns:
            Operations per second, ``None`` if a format of it could not be measured.
        """
        formats = {
            "native": (self.bf16, self.bf16),
            "int8": (self.int8, self.bf16),
            "int8-fp8": (self.int8, self.fp8),
            "fp8-tile": (self.fp8, self.fp8),
        }
        qk, pv = formats[precision]
        return None if qk is None or pv is None else 2 / (1 / qk + 1 / pv)


def measure_ceilings(clock: Clock, device: torch.device, size: int = 8192, rounds: int = 10) -> Ceilings:
    """Measures them: square products of ``size`` and a copy of as many bytes as four such matrices hold."""
    missing = []

    def rate(call: Call, work: float) -> float:
        for _ in range(3):
            clock(call)
        return work / statistics.median(clock(call) for _ in range(rounds))

    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    b = torch.randn(size, size, device=device).to(torch.bfloat16)
    operations = 2.0 * size**3
    bf16 = rate(lambda: a @ b, operations)
    fp8: float | None = None
    int8: float | None = None
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        fp8 = rate(
            lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True),
            operations,
        )
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        missing.append(f"fp8: {_first_line(error)}")
    try:
        a_int, b_int = (x.clamp(-3, 3).mul(40).to(torch.int8) for x in (a, b))
        b_columns = b_int.t()
        int8 = rate(lambda: torch._int_mm(a_int, b_columns), operations)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        missing.append(f"int8: {_first_line(error)}")
    source = torch.empty(8 * size * size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = rate(lambda: target.copy_(source), 2.0 * source.numel())
    return Ceilings(bf16, fp8, int8, copied, tuple(missing))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
