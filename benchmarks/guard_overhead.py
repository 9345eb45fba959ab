"""What the guard costs: ``python -m benchmarks.guard_overhead``.

One attention call by the preset ``sta``, on the shape of a real model, runs in turns with what the guard adds to it:
the look at every output, and a comparison of sampled rows with exact attention. The latter is spread over the calls
from one comparison to the next. Exits with 1 if a share is above its limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from vidaccel.configs.presets import load_preset
from vidaccel.engine.guard import Guard, HeadWatch, check_heads, what_is_wrong
from vidaccel.engine.prepare import HeadGroup, prepare
from vidaccel.engine.run import run_heads
from vidaccel.files import write_json
from vidaccel.kernels.dispatch import select
from vidaccel.layout import TokenLayout
from vidaccel.patterns.dynamic import Heads
from vidaccel.types import VideoGrid

from .timing import Clock, CudaClock, WallClock, interleaved

#: (grid, heads, head size): the small model's, a short clip of a real one, and 81 frames of 480x832 in Wan.
SHAPES = {
    "small": (VideoGrid(8, 16, 16), 6, 32),
    "short": (VideoGrid(9, 30, 26), 12, 128),
    "wan-480p": (VideoGrid(21, 30, 52), 12, 128),
}


@dataclass(frozen=True)
class Row:
    """Median seconds of one attention call and of what the guard adds, and its share of the time.

    Args:
        look: of the look at every output.
        sample: of one comparison.
        every: calls from one comparison to the next.
    """

    shape: str
    tokens: int
    density: float
    call: float
    look: float
    sample: float
    every: int

    @property
    def look_share(self) -> float:
        """Of the look alone."""
        return self.look / self.call

    @property
    def share(self) -> float:
        """Of both."""
        return (self.look + self.sample / self.every) / self.call


def measure(name: str, device: torch.device, guard: Guard, seconds: float) -> Row:
    """Times one shape."""
    grid, heads, dim = SHAPES[name]
    plan = load_preset("sta")
    layout = TokenLayout.of(grid, plan.tile, device=device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    draw = torch.Generator(device).manual_seed(0)
    shape = (1, grid.tokens, heads, dim)
    q, k, v = (torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(3))
    given = Heads(q, k, v, layout)
    sparse = [rule.policy for rule in plan.rules if not rule.policy.is_dense]
    groups: tuple[HeadGroup, ...] = prepare(sparse[-1], heads, layout)
    if len(groups) != 1:
        raise SystemExit(f"sta has {len(groups)} head groups on a {grid} grid; give a shape with one")
    kernel = select(groups[0].request(q))

    def call() -> tuple[torch.Tensor, float]:
        return run_heads(kernel, groups[0], given, {})

    out, density = call()
    found = what_is_wrong(out, v)
    if found is not None:
        raise SystemExit(f"{name}: the output is wrong ({found}), so its time means nothing")
    clock: Clock = CudaClock(device) if device.type == "cuda" else WallClock()
    watch, never = HeadWatch(), Guard(guard.every, guard.rows, 1e9)
    steps = (call, lambda: what_is_wrong(out, v), lambda: check_heads(never, watch, given, out))
    attention, look, sample = (statistics.median(found) for found in interleaved(steps, clock, seconds=seconds))
    return Row(name, grid.tokens, density, attention, look, sample, guard.every)


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| shape | tokens | density | attention | look at every output | one comparison | share of both |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.shape} | {row.tokens} | {row.density:.2f} | {row.call * 1e3:.2f} ms | {row.look * 1e3:.3f} ms"
            f" ({row.look_share:.2%}) | {row.sample * 1e3:.3f} ms | {row.share:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What the guard costs.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--limit", type=float, default=0.02, help="largest share of the attention's time")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long a shape may take")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    guard = Guard(every=given.every, rows=given.rows)
    rows = [measure(name, torch.device(given.device), guard, given.seconds) for name in given.shapes]
    print(table(rows))
    if given.json is not None:
        write_json(given.json, [{**vars(row), "share": row.share} for row in rows])
    worst = max(row.share for row in rows)
    print(f"largest share {worst:.2%}, limit {given.limit:.0%}, every {given.every} calls, {given.rows} rows")
    sys.exit(worst > given.limit)


if __name__ == "__main__":
    main()
