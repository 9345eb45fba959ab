"""The forward kernel's machine code; several tests read the same, so a process compiles each configuration once."""

from __future__ import annotations

from functools import cache

import pytest

from vidaccel.kernels.triton.configs import Entry
from vidaccel.kernels.triton.costmodel import step_of
from vidaccel.kernels.triton.counting import compile_forward, count_step
from vidaccel.kernels.triton.gate import MachineCode

__all__ = ["check_counts", "compiled"]

compiled = cache(compile_forward)


def check_counts(entry: Entry, code: MachineCode, *, tail: bool) -> None:
    """The counts that the cost model lives on are those of ``code``, or not far from them."""
    now = count_step(entry, code).to_dict()
    stored = step_of(entry.arch, entry.kind, entry.head_dim, entry.config, tail=tail).counts
    assert now["products"] == stored["products"]
    for name in ("exponentials", "arithmetic", "memory", "issued"):
        assert now[name] == pytest.approx(stored[name], rel=0.1, abs=16), "run python -m benchmarks.gate_counts"
