"""Regenerates the instruction counts that the cost model lives on, by compiling every shipped configuration.

Needs Triton and no GPU; takes about ten minutes on one idle core. Run it when the forward kernel, ``configs.yaml`` or
the Triton version that gives the verdict has changed. A run that was interrupted goes on where it stopped.

    python -m benchmarks.gate_counts [--jobs 2] [--out vidaccel/kernels/triton/step_counts.yaml]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vidaccel.errors import KernelError
from vidaccel.files import atomic_path
from vidaccel.kernels import triton as package
from vidaccel.kernels.triton.configs import table

__all__ = ["COMMAND", "Journal", "main", "written"]

COMMAND = "python -m benchmarks.gate_counts"

_HEADER = """\
# Instructions of one step of the forward kernel's loop, for each configuration of configs.yaml. See costmodel.py.
#
# Made by `{command}` with Triton {triton}: each configuration compiled for its architecture, with
# the pooled tail and without, and its machine code read.
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


class Journal:
    """Rows of a run that is not finished, a JSON line each, in a file beside the result.

    Its first line says what the rows depend on: the sources and Triton's version. Rows of anything else are dropped.

    Args:
        path: the file, which need not exist.
        origin: what rows depend on.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        if lines and lines[0] == origin:
            # the last line is empty, or was being written when the run ended
            self.rows = dict(json.loads(line) for line in lines[1:-1])
        kept = [origin, *(json.dumps(item) for item in self.rows.items())]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.rows[key] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, row]) + "\n")

    def close(self) -> None:
        """Deletes the file: the result is written."""
        self._path.unlink()


def _origin(triton_version: str) -> str:
    """Digest of what a row is made from, but for its configuration."""
    names = ("forward.py", "softmax.py", "gate.py", "disassembly.py", "counting.py")
    folder = Path(package.__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in names)
    return f"triton {triton_version}, sources {hashlib.sha256(sources).hexdigest()}"


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
    work = {
        f"{table()[index]}{' tail' if tail else ''}": (tail, index)
        for tail in (True, False)
        for index in range(len(table()))
    }
    journal = Journal(args.out.with_suffix(".unfinished"), _origin(counting.TRITON_VERSION))
    todo = {key: job for key, job in work.items() if key not in journal.rows}
    failed = 0
    # processes, because the compiler holds Python's lock
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for key, row in zip(todo, pool.map(_row, *zip(*todo.values(), strict=True)), strict=True):
            if isinstance(row, str):
                failed += 1
                print(f"error: {key}: {row}", file=sys.stderr)
            else:
                journal.add(key, row)
                print(f"{len(journal.rows)} of {len(work)}: {key}", flush=True)
    with atomic_path(args.out) as temporary:
        rows = [journal.rows[key] for key in work if key in journal.rows]
        temporary.write_text(written(rows, counting.TRITON_VERSION), encoding="utf-8")
    journal.close()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
