"""What is known of each kernel without a GPU: which tests reached it, on which architecture.

Runs of the tests write what they did with ``--proof FOLDER``, a file each; ``python -m tests.kernels.triton.proofs
FOLDER`` makes a table of them and writes it into docs/KERNELS.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

__all__ = ["REACHED", "Proof", "main", "table"]

#: How a kernel was reached, and what is counted.
WAYS = {"interpreter": "launches", "gate": "programs", "ptx": "CTAs"}
ARCHES = (80, 86, 89, 90, 100, 120)
_BEGIN, _END = "<!-- proofs: begin -->", "<!-- proofs: end -->"
_PAGE = Path("docs/KERNELS.md")


#: What the test that runs has reached: (kernel, architecture, number).
REACHED: list[tuple[str, int, int]] = []


class Proof:
    """One run's counts.

    Args:
        way: a key of :data:`WAYS`.
        triton: version.
        marks: what pytest's -m chose, "" for all tests.
    """

    def __init__(self, way: str, triton: str, marks: str) -> None:
        self.way, self.triton, self.marks = way, triton, marks
        self.counts: Counter[tuple[str, int]] = Counter()
        self.failed = False

    def add(self, entries: Iterable[tuple[str, int, int]]) -> None:
        """Counts (kernel, architecture, number); the interpreter has architecture 0."""
        for kernel, arch, number in entries:
            self.counts[kernel, arch] += number

    def write(self, folder: Path) -> None:
        """Keeps the run, if no test failed; a later run of the same kind and version replaces it."""
        if self.failed or not self.counts:
            return
        folder.mkdir(parents=True, exist_ok=True)
        counts = [[kernel, arch, number] for (kernel, arch), number in sorted(self.counts.items())]
        data = {"way": self.way, "triton": self.triton, "date": date.today().isoformat(), "counts": counts}
        data["tests"] = self.marks or "all"
        (folder / f"{self.way}-{self.triton}.json").write_text(json.dumps(data), encoding="utf-8")


def table(runs: Sequence[dict]) -> str:
    """Markdown: a row for each kernel; of several versions the numbers stand one behind the other."""
    numbers: dict[tuple[str, int, str], list[int]] = {}
    names: set[str] = set()
    for run in runs:
        for kernel, arch, number in run["counts"]:
            names.add(kernel)
            numbers.setdefault((kernel, arch, run["way"]), []).append(number)

    def cell(kernel: str, arch: int, way: str) -> str:
        return " + ".join(map(str, numbers.get((kernel, arch, way), []))) or "-"

    head = ["Kernel", "Interpreter", *(f"sm_{arch}" for arch in ARCHES), "GPU"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    # tests have kernels of their own
    for kernel in sorted(name for name in names if any((name, arch, "ptx") in numbers for arch in ARCHES)):
        cells = [f"{cell(kernel, arch, 'gate')} / {cell(kernel, arch, 'ptx')}" for arch in ARCHES]
        row = [f"`{kernel}`", cell(kernel, 0, "interpreter"), *cells, "not yet"]
        lines.append(f"| {' | '.join(row)} |")
    when = "; ".join(f"{run['way']}, {run['tests']} tests, Triton {run['triton']}, {run['date']}" for run in runs)
    return "\n".join([*lines, "", f"Made by `python -m tests.kernels.triton.proofs` of these runs: {when}."])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 if there are no runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where runs wrote what they did")
    parser.add_argument("--page", type=Path, default=_PAGE, help=f"the page to write into (default: {_PAGE})")
    args = parser.parse_args(argv)
    order = list(WAYS)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.folder.glob("*.json"))]
    runs.sort(key=lambda run: (order.index(run["way"]), run["triton"]))
    if not runs:
        print(f"error: {args.folder} has no runs; run the tests with --proof {args.folder}")
        return 1
    text = args.page.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    args.page.write_text(f"{before}{_BEGIN}\n{table(runs)}\n{_END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
