"""How much of the skipped work attention really saves: sparse against dense on the same tensors.

The *fraction of ideal* is dense time x density / our time: 1 means that a tenth of the work takes a tenth of the
time. Dense and sparse take turns within each round, and the fraction is the median over the rounds, so that a machine
that is busy with other things slows both alike. Every result is compared with the float64 oracle first; a wrong one
ends the run before any time is printed.

    python -m benchmarks.attention --device cpu [--quick] [--threads N] [--json PATH]
    python -m benchmarks.attention --device cuda [--minutes N] [--shapes NAME ...] [--json PATH]

On a CUDA device (:mod:`.cuda_attention`) it runs at the shapes of video models, in every precision and beside other
projects' kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.device import device_info
from vidaccel.kernels import KernelRequest, select, why_not_table
from vidaccel.kernels.contract import Kernel
from vidaccel.kernels.reference import block_sparse_attention as oracle
from vidaccel.layout import TokenLayout
from vidaccel.types import PRECISIONS, TileShape, VideoGrid

from . import cuda_run

NATIVE = PRECISIONS["native"]
BATCH, HEADS, HEAD_DIM = 1, 8, 64
GRID = VideoGrid(16, 16, 16)  # 4096 tokens
#: 256 tokens a tile suit the CPU, whose matrix products like long operands; with 128 the fraction is about .1 lower.
TILE = TileShape(4, 8, 8)
DENSITIES = (1.0, 0.5, 0.2, 0.1)
DTYPES = (torch.float32, torch.bfloat16)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One measured case.

    Args:
        dtype: of q, k and v.
        kernel: name of the kernel.
        density: kept token pairs over all; whole tiles are kept, so it is near the density asked for.
        tail: whether the pooled tail was computed as well.
        seconds: median wall-clock seconds of one call.
        dense_seconds: likewise of dense SDPA, in the same rounds.
        speedup: median over the rounds of dense time / our time.
        fraction_of_ideal: speedup x density.
        error: relative L2 error against the float64 oracle, on the heads that were checked.
    """

    dtype: str
    kernel: str
    density: float
    tail: bool
    seconds: float
    dense_seconds: float
    speedup: float
    fraction_of_ideal: float
    error: float


@dataclass(frozen=True)
class Case:
    """A mask and a tail to measure."""

    mask: BlockMask
    tail: bool


def random_mask(layout: TokenLayout, density: float) -> BlockMask:
    """A mask per head with the same number of kept blocks in each row, its own block among them."""
    n = layout.num_blocks
    score = torch.rand(1, HEADS, n, n) + 2 * torch.eye(n)
    rank = score.argsort(-1, descending=True).argsort(-1)
    return BlockMask.from_dense(rank < max(1, round(density * n)))


def dense_attention(inputs: Inputs) -> torch.Tensor:
    """What a model without vidaccel runs, on the strides that models have: [B,S,H,D] storage."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def checked_error(inputs: Inputs, layout: TokenLayout, case: Case, kernel: Kernel) -> float:
    """Relative L2 error of the first and the last head against the oracle.

    Raises:
        SystemExit: if it is larger than rounding explains.
    """
    out = kernel(*inputs, layout, case.mask, tail=case.tail)
    assert isinstance(out, torch.Tensor)
    errors = []
    for head in (0, HEADS - 1):
        q, k, v = (x[:, :, head : head + 1] for x in inputs)
        mask = BlockMask(case.mask.kv_num_blocks[:, [head]], case.mask.kv_indices[:, [head]])
        exact = oracle(q, k, v, layout, mask, tail=case.tail, out_dtype=torch.float64)
        assert isinstance(exact, torch.Tensor)
        errors.append(float((out[:, :, head : head + 1].double() - exact).norm() / exact.norm()))
    # 16-bit outputs are rounded once; float32 sums round often but far below any mistake
    limit = torch.finfo(out.dtype).eps * (8 if out.dtype == torch.float32 else 2)
    if not (max(errors) <= limit and out.isfinite().all()):
        raise SystemExit(f"{kernel.name} is wrong at {case}: error {max(errors):.2e}, allowed {limit:.2e}")
    return max(errors)


def interleaved(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Wall-clock seconds of each call in each round, after one round of warm-up."""
    times: list[list[float]] = [[] for _ in calls]
    for index in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if index:
                seconds.append(time.perf_counter() - start)
    return times


def _kernels(request: KernelRequest) -> list[Kernel]:
    """The one that a plan would take, and FlexAttention where it can be compiled."""
    flex = why_not_table(request)["flex"] is None
    return [select(request), *([select(request, prefer="flex")] if flex else [])]


def measure(dtype: torch.dtype, rounds: int) -> list[Row]:
    """Every density, with and without the tail, in one dtype on the CPU."""
    torch.manual_seed(0)
    layout = TokenLayout.of(GRID, TILE)
    q, k, v = torch.randn(3, BATCH, layout.tokens, HEADS, HEAD_DIM).to(dtype)
    inputs = (q, k, v)
    cases = [Case(random_mask(layout, density), tail) for density in DENSITIES for tail in (False, True)]
    cases = [case for case in cases if not (case.tail and case.mask.is_full())]  # nothing skipped, no tail
    runs = [(case, kernel) for case in cases for kernel in _kernels(KernelRequest.of(q, NATIVE, tail=case.tail))]
    errors = [checked_error(inputs, layout, case, kernel) for case, kernel in runs]

    def call(kernel: Kernel, case: Case) -> Callable[[], object]:
        return lambda: kernel(*inputs, layout, case.mask, tail=case.tail)

    sparse = [call(kernel, case) for case, kernel in runs]
    dense, *times = interleaved([lambda: dense_attention(inputs), *sparse], rounds)
    rows = []
    for (case, kernel), error, seconds in zip(runs, errors, times, strict=True):
        speedup = statistics.median(d / s for d, s in zip(dense, seconds, strict=True))
        density = case.mask.density(layout)
        rows.append(
            Row(
                dtype=str(dtype).removeprefix("torch."),
                kernel=kernel.name,
                density=density,
                tail=case.tail,
                seconds=statistics.median(seconds),
                dense_seconds=statistics.median(dense),
                speedup=speedup,
                fraction_of_ideal=speedup * density,
                error=error,
            )
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table and writes the JSON file if one is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description="Sparse attention against dense."
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run (auto: cuda if there is one)"
    )
    parser.add_argument("--quick", action="store_true", help="cpu: 3 rounds instead of 9; cuda: two shapes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1: least disturbed by other processes)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the environment here")
    cuda_run.add_arguments(parser.add_argument_group("on a CUDA device"))
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}; give at least 1")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring, not after
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        return cuda_run.run(args)
    torch.set_num_threads(args.threads)
    rounds = 3 if args.quick else 9

    info = device_info()
    print(f"{info.cpu}, {args.threads} thread(s), torch {torch.__version__}, Python {platform.python_version()}")
    print(f"L={GRID.tokens} H={HEADS} D={HEAD_DIM}, tiles of {TILE.tokens} tokens, random masks, {rounds} rounds")
    if not info.cpu_bf16:
        print("this CPU has no bf16 matrix instructions: bfloat16 is converted, for dense and sparse alike")
    rows: list[Row] = []
    for dtype in DTYPES:
        measured = measure(dtype, rounds)
        if not rows:
            print(
                f"{'dtype':10}{'kernel':14}{'density':>8}{'tail':>6}"
                f"{'seconds':>10}{'dense':>9}{'speed-up':>10}{'of ideal':>10}"
            )
        for row in measured:
            print(
                f"{row.dtype:10}{row.kernel:14}{row.density:8.3f}{'yes' if row.tail else 'no':>6}{row.seconds:10.4f}"
                f"{row.dense_seconds:9.4f}{row.speedup:9.2f}x{row.fraction_of_ideal:10.2f}"
            )
        sys.stdout.flush()
        rows += measured
    if args.json:
        record = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": args.device,
            "threads": args.threads,
            "rounds": rounds,
            "shape": {"tokens": GRID.tokens, "heads": HEADS, "head_dim": HEAD_DIM, "tile": list(TILE)},
            "environment": asdict(info),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
