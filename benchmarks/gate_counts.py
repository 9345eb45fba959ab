"""Regenerates the instruction counts that the cost model lives on, by compiling every shipped configuration.

Needs Triton and no GPU; takes about ten minutes on one core. Run it when the forward kernel, ``configs.yaml`` or the
Triton version that gives the verdict has changed.

    python -m benchmarks.gate_counts [--jobs 2] [--out vidaccel/kernels/triton/step_counts.yaml]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vidaccel.errors import KernelError
from vidaccel.files import atomic_path
from vidaccel.kernels.triton.configs import table

__all__ = ["COMMAND", "main", "written"]

COMMAND = "python -m benchmarks.gate_counts"

_HEADER = """\
# Instructions of one step of the forward kernel's loop, for each configuration of configs.yaml. See costmodel.py.
#
# Made by `{command}` with Triton {triton}: each configuration compiled for its architecture and its machine code read.
# Counts are instructions of a warp summed over a program's computing warps; products are multiply-adds of the program.
"""


def written(rows: Iterable[dict[str, Any]], triton_version: str) -> str:
    """The file's text, a row a line."""
    lines = [f"- {_flow(row)}" for row in rows]
    return _HEADER.format(command=COMMAND, triton=triton_version) + "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(round(value)) if isinstance(value, float) else str(value)


def _row(tail: bool, index: int) -> dict[str, Any] | str:
    """The row of one configuration, or why there is none."""
    from vidaccel.kernels.triton import counting

    entry = table()[index]
    try:
        code = counting.compile_forward(entry.arch, entry.kind, entry.head_dim, entry.config, bias=int(tail))
        counts = counting.count_step(entry, code).to_dict()
    except KernelError as error:
        return str(error)
    row = {"arch": entry.arch, "kind": entry.kind, "head_dim": entry.head_dim, "tail": tail}
    return row | {"config": asdict(entry.config), "counts": counts}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 2 without Triton, 1 if a configuration does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path("vidaccel/kernels/triton/step_counts.yaml")
    parser.add_argument("--out", type=Path, default=default, help=f"the file (default: {default})")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at the same time")
    args = parser.parse_args(argv)
    try:
        from vidaccel.kernels.triton import counting
    except ImportError as error:
        print(f"error: Triton is needed to compile ({error}); put it on PYTHONPATH", file=sys.stderr)
        return 2
    work = [(tail, index) for tail in (True, False) for index in range(len(table()))]
    rows, failed = [], 0
    # processes, because the compiler holds Python's lock
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for (tail, index), row in zip(work, pool.map(_row, *zip(*work, strict=True)), strict=True):
            if isinstance(row, str):
                failed += 1
                print(f"error: {table()[index]}: {row}", file=sys.stderr)
            else:
                rows.append(row)
                print(f"{len(rows)} of {len(work)}: {table()[index]}{' tail' if tail else ''}", flush=True)
    with atomic_path(args.out) as temporary:
        temporary.write_text(written(rows, counting.TRITON_VERSION), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
