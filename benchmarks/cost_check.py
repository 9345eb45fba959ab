"""The cost model beside measurements: predicted and measured seconds of the forward kernel, and how far apart.

Reads what ``python -m benchmarks.attention --device cuda --json PATH`` or the suite wrote. Measured times include
making 8-bit copies and block means, which the model leaves out, so those precisions look slower than predicted.

    python -m benchmarks.cost_check PATH
    python -m benchmarks.cost_check --predict ARCH
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidaccel.errors import KernelError
from vidaccel.kernels.triton.costmodel import Agreement, Prediction, check, hardware, predict
from vidaccel.types import PRECISIONS

from .ours import PLAIN
from .shapes import DENSITIES, FORMATS, SHAPES, make_mask

__all__ = ["agreement", "main", "pairs_of"]


def pairs_of(record: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Prediction, float]]:
    """(row, prediction, measured seconds) of every row of a results file that the kernel for every device was timed
    for; the Gluon kernel has machine code of its own."""
    major, minor = record["environment"]["gpus"][0]["capability"]
    plain = {_what(row) for row in record["rows"] if row["kernel"] == PLAIN}
    for row in record["rows"]:
        if row["status"] != "ok" or row["kernel"] != (PLAIN if _what(row) in plain else "triton"):
            continue
        shape = SHAPES[row["shape"]]
        layout = shape.layout()
        asked = min(DENSITIES, key=lambda density: abs(density - row["density"]))
        mask = make_mask("random" if row["mask"] == "dense" else row["mask"], layout, asked, shape.heads)
        prediction = predict(
            10 * major + minor,
            PRECISIONS[row["precision"]],
            shape.head_dim,
            layout,
            heads=shape.heads,
            mask=mask,
            tail=row["tail"],
        )
        yield row, prediction, row["seconds"]


def _what(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("shape", "precision", "mask", "density", "tail"))


def agreement(record: dict[str, Any]) -> Agreement:
    """All rows of a results file together.

    Raises:
        KernelError: if the file has no measured row of our kernel.
    """
    return check((prediction, seconds) for _, prediction, seconds in pairs_of(record))


def _predict(arch: int) -> None:
    gpu = hardware(arch)
    print(f"predicted for {gpu.name} (sm_{arch}), not measured; overlapped, and if no two units ever work at once")
    for shape in SHAPES.values():
        layout = shape.layout()
        for name in FORMATS:
            for density in DENSITIES:
                try:
                    found = predict(arch, PRECISIONS[name], shape.head_dim, layout, heads=shape.heads, density=density)
                except KernelError as error:
                    print(f"{shape.name:15}{name:10}{density:6.2f}  {error}")
                    continue
                print(
                    f"{shape.name:15}{name:10}{density:6.2f}{found.seconds:11.6f}{found.without_overlap:11.6f}"
                    f"{shape.operations(density) / found.seconds / 1e12:8.0f} TFLOP/s  {found.limit}"
                )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 if nothing can be compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="a JSON file of the attention benchmark")
    parser.add_argument("--predict", type=int, metavar="ARCH", help="only print predictions, for example for 90")
    args = parser.parse_args(argv)
    if (args.results is None) == (args.predict is None):
        parser.error("give a results file or --predict ARCH")
    try:
        if args.predict is not None:
            _predict(args.predict)
            return 0
        record = json.loads(args.results.read_text(encoding="utf-8"))
        for row, prediction, seconds in pairs_of(record):
            print(
                f"{row['shape']:15}{row['precision']:10}{row['mask']:7}{row['density']:7.3f} tail={row['tail']!s:6}"
                f" predicted {prediction.seconds:.6f} measured {seconds:.6f} x{seconds / prediction.seconds:.2f}"
            )
        found = agreement(record)
    except (OSError, KernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{found.pairs} pairs: measured over predicted {found.median:.2f} in the median, {found.least:.2f} to"
        f" {found.most:.2f}; {found.within:.0%} within the bounds, {found.rank:.0%} in the right order"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
