"""What a run executed, kernel by kernel; and compilation that ends with PTX."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.kernels.triton.ptx.emulator import Emulator

__all__ = ["Executions", "without_assembler"]

#: kernel, CTAs, CPU seconds of one launch
Execution = tuple[str, int, float]


class Executions:
    """Launches, CTAs and CPU seconds of each kernel on each architecture."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0, 0.0])

    @staticmethod
    def of(emulator: Emulator) -> list[Execution]:
        """The launches of one emulator as plain data, which go from process to process."""
        return [(entry.kernel, entry.ctas, entry.seconds) for entry in emulator.log]

    def add(self, entries: Iterable[tuple[int, str, int, float]]) -> None:
        """Counts (architecture, kernel, CTAs, seconds) of one launch each."""
        for arch, kernel, ctas, seconds in entries:
            total = self.totals[kernel, arch]
            total[0] += 1
            total[1] += ctas
            total[2] += seconds

    def lines(self) -> list[str]:
        """A table for a person; nothing if nothing ran."""
        rows = [
            f"{kernel:28s} sm_{arch:<4d} {launches:6.0f} launches {ctas:7.0f} CTAs {seconds:7.1f} s"
            for (kernel, arch), (launches, ctas, seconds) in sorted(self.totals.items())
        ]
        whole = sum(seconds for _, _, seconds in self.totals.values())
        return [f"executed as PTX of Triton {triton.__version__}, {whole:.0f} CPU seconds:", *rows] if rows else []


@contextlib.contextmanager
def without_assembler(folder: Path) -> Iterator[None]:
    """Triton stops at PTX, which takes half the time; the gate assembles the same kernels. What it compiles is kept in
    ``folder``, where no driver ever looks for machine code."""
    from triton.backends.nvidia.compiler import CUDABackend

    def nothing(self: Any, *arguments: Any) -> bytes:
        return b""

    with pytest.MonkeyPatch.context() as patch, triton.knobs.cache.scope(), triton.knobs.language.scope():
        patch.setattr(CUDABackend, "make_cubin", nothing)
        triton.knobs.cache.dir = str(folder)
        triton.knobs.language.default_fp_fusion = True  # the default, said aloud: Triton 3.9 warns that it will change
        yield
