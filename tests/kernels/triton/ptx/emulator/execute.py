"""Runs a program over a grid, one CTA after another. Needs neither torch nor Triton."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cta import Cta
from .faults import Fault
from .memory import GlobalMemory
from .program import Program

__all__ = ["Launch", "execute", "parameter_bytes"]


@dataclass(frozen=True)
class Launch:
    """What one launch did.

    Args:
        kernel: its name.
        ctas: how many ran.
        instructions: of all warps.
        mma, wgmma: products, of each warp.
        tma: tiles loaded and stored.
        seconds: CPU time.
    """

    kernel: str
    ctas: int
    instructions: int
    mma: int
    wgmma: int
    tma: int
    seconds: float


def parameter_bytes(program: Program, values: list[bytes]) -> NDArray[np.uint8]:
    """The kernel's parameters as they lie in memory.

    Raises:
        ValueError: if their number or sizes are not those of the kernel.
    """
    declared = program.kernel.params
    if len(values) != len(declared) or any(len(v) != p.size for v, p in zip(values, declared, strict=True)):
        raise ValueError(
            f"{program.kernel.name} has parameters of {[p.size for p in declared]} bytes, "
            f"not {[len(v) for v in values]}"
        )
    out = np.zeros(declared[-1].offset + declared[-1].size if declared else 0, np.uint8)
    for value, p in zip(values, declared, strict=True):
        out[p.offset : p.offset + p.size] = np.frombuffer(value, np.uint8)
    return out


def execute(
    program: Program,
    memory: GlobalMemory,
    parameters: NDArray[np.uint8],
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    warps: int = 1,
    shared: int = 0,
    only: Callable[[int, int, int], bool] | None = None,
    faults: list[Fault],
    options: Mapping[str, Any] | None = None,
) -> Launch:
    """Runs a program; its faults are added to ``faults``, of each kind at an instruction those of the first CTA.

    Args:
        parameters: as :func:`parameter_bytes` makes them.
        warps: of a CTA, unless the kernel says how many threads it has.
        shared: bytes of shared memory of a CTA.
        only: the CTAs that run; all of the grid by default.
        options: of :class:`.Cta`: asynchronous, schedule, seed.

    Raises:
        Fault: after which execution cannot go on.
    """
    begin = time.process_time()
    counts = dict.fromkeys(("instructions", "mma", "wgmma", "tma"), 0)
    warps = program.kernel.threads // 32 if program.kernel.threads else warps
    seen: set[tuple[int, str, str]] = set()
    ctas = 0
    with np.errstate(all="ignore"):
        for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
            if only is not None and not only(x, y, z):
                continue
            cta = Cta(
                program,
                memory,
                parameters,
                warps=warps,
                shared=shared,
                position=(x, y, z),
                grid=grid,
                seen=seen,
                **(options or {}),
            )
            ctas += 1
            try:
                cta.run()
            finally:
                faults += cta.faults
            for name in counts:
                counts[name] += cta.counts[name]
    return Launch(program.kernel.name, ctas, **counts, seconds=time.process_time() - begin)
