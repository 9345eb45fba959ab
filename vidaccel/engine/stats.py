"""What ran, how dense, how long, and what fell back and why: collected per layer, told as one report."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["LayerStats", "Report", "Stopwatch"]


class Stopwatch:
    """Adds up seconds: wall clock on a CPU, events on CUDA, which are read only when the total is asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # threads may share a layer
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Times the body; a body that raises is not counted."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pending.append((start, end))
        else:
            began = time.perf_counter()
            yield
            spent = time.perf_counter() - began
            with self._lock:
                self._seconds += spent

    @property
    def seconds(self) -> float:
        """Total so far."""
        with self._lock:
            pending, self._pending = self._pending, []
            for start, end in pending:
                end.synchronize()
                self._seconds += start.elapsed_time(end) / 1000
            return self._seconds


@dataclass
class LayerStats:
    """Counters of one attention layer.

    ``fallbacks`` counts calls that a plan wanted sparse or quantised and that ran otherwise, by reason.
    """

    transformer: str
    layer: int
    module: str
    calls: int = 0
    sparse_calls: int = 0
    density_sum: float = 0.0
    sparse_density_sum: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    timer: Stopwatch = field(default_factory=Stopwatch)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, kernel: str, density: float, *, sparse: bool) -> None:
        """Adds one finished call; ``density`` is kept token pairs over all, averaged over heads."""
        with self._lock:  # threads may share a layer
            self.calls += 1
            self.density_sum += density
            self.kernels[kernel] += 1
            if sparse:
                self.sparse_calls += 1
                self.sparse_density_sum += density

    def count_fallback(self, reason: str) -> None:
        """Adds one call that did not run as planned."""
        with self._lock:
            self.fallbacks[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        seconds = self.timer.seconds
        with self._lock:
            return {
                "transformer": self.transformer,
                "layer": self.layer,
                "module": self.module,
                "calls": self.calls,
                "sparse_calls": self.sparse_calls,
                "density": self.density_sum / self.calls if self.calls else None,
                "seconds": seconds,
                "kernels": dict(self.kernels),
                "fallbacks": dict(self.fallbacks),
            }


@dataclass(frozen=True)
class Report:
    """What a session did since it was made or its statistics were reset.

    Args:
        plan: the plan's name.
        layers: one dict a patched layer, as :meth:`LayerStats.to_dict` makes it.
        not_patched: attention modules left alone, with the reason.
        events: things worth knowing, each said once: token order, precision downgrades, guard interventions.
        density: kept token pairs over all, mean over all calls (dense calls count as 1); ``None`` before any call.
        sparse_density: the same over the calls that ran sparse; ``None`` if none did.
        linear: Linears that the plan wants in 8 bits, a dict for each path: ``transformer``, ``module``, ``layers``,
            and their ``precision``, or the ``reason`` why they are left as they are.
    """

    plan: str
    layers: tuple[dict[str, Any], ...]
    not_patched: tuple[dict[str, str], ...]
    events: tuple[str, ...]
    density: float | None
    sparse_density: float | None
    linear: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def of(
        plan: str,
        stats: list[LayerStats],
        not_patched: list[dict[str, str]],
        events: list[str],
        linear: Sequence[dict[str, Any]] = (),
    ) -> Report:
        """Sums the layers up."""
        calls, sparse = sum(s.calls for s in stats), sum(s.sparse_calls for s in stats)
        return Report(
            plan=plan,
            layers=tuple(s.to_dict() for s in stats),
            not_patched=tuple(not_patched),
            events=tuple(events),
            density=sum(s.density_sum for s in stats) / calls if calls else None,
            sparse_density=sum(s.sparse_density_sum for s in stats) / sparse if sparse else None,
            linear=tuple(linear),
        )

    @property
    def calls(self) -> int:
        """Attention calls of all patched layers."""
        return sum(layer["calls"] for layer in self.layers)

    @property
    def sparse_calls(self) -> int:
        """Those that ran sparse."""
        return sum(layer["sparse_calls"] for layer in self.layers)

    @property
    def attention_seconds(self) -> float:
        """Seconds inside self-attention, planning and fallbacks included."""
        return sum(layer["seconds"] for layer in self.layers)

    @property
    def kernels(self) -> dict[str, int]:
        """Calls by kernel."""
        return dict(sum((Counter(layer["kernels"]) for layer in self.layers), Counter()))

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that did not run as planned, by reason."""
        return dict(sum((Counter(layer["fallbacks"]) for layer in self.layers), Counter()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "plan": self.plan,
            "density": self.density,
            "sparse_density": self.sparse_density,
            "attention_seconds": self.attention_seconds,
            "calls": self.calls,
            "sparse_calls": self.sparse_calls,
            "kernels": self.kernels,
            "fallbacks": self.fallbacks,
            "layers": list(self.layers),
            "not_patched": list(self.not_patched),
            "linear": list(self.linear),
            "events": list(self.events),
        }

    def __str__(self) -> str:
        if not self.calls:
            head = f"plan {self.plan}: no attention call yet, {len(self.layers)} layers patched"
        else:
            assert self.density is not None
            head = (
                f"plan {self.plan}: {self.sparse_calls} of {self.calls} attention calls sparse,"
                f" density {self.density:.3f} over all calls"
                + (f" and {self.sparse_density:.3f} over the sparse ones" if self.sparse_density is not None else "")
                + f", {self.attention_seconds:.2f} s in attention"
            )
        lines = [
            head,
            "",
            f"{'transformer':<15} {'layer':>5} {'calls':>6} {'sparse':>6} {'density':>8} {'seconds':>8}  ran on",
        ]
        for layer in self.layers:
            density = "-" if layer["density"] is None else f"{layer['density']:.3f}"
            ran = ", ".join(f"{name} x{count}" for name, count in layer["kernels"].items()) or "-"
            lines.append(
                f"{layer['transformer']:<15} {layer['layer']:>5} {layer['calls']:>6} {layer['sparse_calls']:>6}"
                f" {density:>8} {layer['seconds']:>8.2f}  {ran}"
            )
        for reason, count in self.fallbacks.items():
            lines.append(f"not as planned, {count} calls: {reason}")
        lines += self._linear_lines()
        lines += [f"left alone: {entry['module']}: {entry['reason']}" for entry in self.not_patched]
        lines += [f"note: {event}" for event in self.events]
        return "\n".join(lines)

    def _linear_lines(self) -> list[str]:
        """Numbers of Linears by precision, and by the reason for those left as they are."""
        counts: Counter[tuple[str, str]] = Counter()
        for row in self.linear:
            kind = ("", row["precision"]) if "precision" in row else (": ", row["reason"])
            counts[kind] += len(row["layers"])
        lines = [f"Linears in {told}: {count}" for (sign, told), count in counts.items() if not sign]
        return lines + [
            f"Linears left as they are: {count}{sign}{told}" for (sign, told), count in counts.items() if sign
        ]
