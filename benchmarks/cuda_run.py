"""The command line of the benchmarks on a CUDA device: which shapes, what is printed and what is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vidaccel.device import device_info
from vidaccel.files import write_json
from vidaccel.types import KERNEL_PRECISIONS

from .cuda_attention import HEADER, Deadline, Row, format_row, measure_shape
from .peers import PEERS
from .shapes import DENSITIES, FORMATS, MASKS, SHAPES
from .timing import Ceilings, Clock, CudaClock, measure_ceilings

__all__ = ["NO_CUDA", "QUICK", "add_arguments", "environment", "measure", "no_cuda", "run"]

#: Exit code where there is no CUDA device.
NO_CUDA = 2

#: What ``--quick`` measures.
QUICK = ("wan-480p-1.3b", "hunyuan")


def add_arguments(parser: Any) -> None:
    """The options of a CUDA run, on an ``argparse`` parser or group."""
    parser.add_argument("--minutes", type=float, default=20.0, help="stop beginning new masks after this long")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="which shapes (default: all)")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES), help="share of pairs kept")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), help="which kinds of mask")
    parser.add_argument("--precisions", nargs="+", choices=list(KERNEL_PRECISIONS), default=list(FORMATS))
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="which other kernels")


def no_cuda() -> str | None:
    """Why nothing can be measured on a CUDA device, or ``None``."""
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device that torch can use; run this on a machine with one, or give --device cpu"


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Date, machine and versions, for the head of a results file."""
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": device_info().to_dict(),
        "cuda": torch.version.cuda,
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["device"] = properties.name
        record["multiprocessors"] = properties.multi_processor_count
    return record


def measure(
    names: Sequence[str],
    *,
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings,
    deadline: Deadline,
    report: Callable[[Row], None],
    **options: Any,
) -> list[Row]:
    """The rows of some shapes; ``report`` gets each as soon as it is known.

    Args:
        options: what :func:`.cuda_attention.measure_shape` takes besides.
    """
    rows: list[Row] = []
    for name in names:
        for row in measure_shape(
            SHAPES[name], device=device, clock=clock, ceilings=ceilings, deadline=deadline, **options
        ):
            report(row)
            rows.append(row)
    return rows


def run(args: argparse.Namespace) -> int:
    """``python -m benchmarks.attention`` on a CUDA device; returns the exit code, 1 if a kernel of ours was wrong."""
    reason = no_cuda()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return NO_CUDA
    device = torch.device("cuda", torch.cuda.current_device())
    clock = CudaClock(device)
    deadline = Deadline(60 * args.minutes)
    ceilings = measure_ceilings(clock, device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(ceilings_line(ceilings))
    print(HEADER)
    rows = measure(
        args.shapes or (QUICK if args.quick else tuple(SHAPES)),
        device=device,
        clock=clock,
        ceilings=ceilings,
        deadline=deadline,
        report=lambda row: print(format_row(row), flush=True),
        densities=args.densities,
        masks=args.masks,
        precisions=args.precisions,
        peers=[peer for peer in PEERS if peer.name in args.peers],
    )
    if args.json:
        write_record(args.json, rows, ceilings, device)
    wrong = [row for row in rows if row.status == "wrong"]
    for row in wrong:
        print(f"error: {row.kernel} {row.precision} at {row.shape} is wrong: {row.reason}", file=sys.stderr)
    return 1 if wrong else 0


def write_record(path: Path, rows: Sequence[Row], ceilings: Ceilings, device: torch.device) -> None:
    """Rows with the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = environment(device) | {"ceilings": asdict(ceilings), "rows": [row.to_dict() for row in rows]}
    write_json(path, record)


def ceilings_line(ceilings: Ceilings) -> str:
    """What the device reached, in words."""
    parts = [f"{name} {value / 1e12:.0f}" for name in ("bf16", "fp8", "int8") if (value := getattr(ceilings, name))]
    line = (
        f"matrix products in 10^12 operations/s: {', '.join(parts)}; copy {ceilings.bytes_per_second / 1e12:.2f} TB/s"
    )
    return line + "".join(f"; no {reason}" for reason in ceilings.missing)
