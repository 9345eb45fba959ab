"""What each compensation leaves of the error of skipping blocks, on q, k and v captured from the shipped small model.

The error is |out - dense| / |dense| of each head, in the L2 norm, and its mean over heads, layers and noise levels.
Patterns that choose in each call keep a share of the blocks of each row; windows are fixed. ``pairs`` is what a rule
computes besides the kept blocks, as a share of all token pairs, the mean over patterns.

Re-ttention goes by what an earlier step left behind. It gets the four steps after a full one, on the straight line
between a clip and its noise, a fiftieth apart; its ``pairs`` spread the full step over the five.

    python -m benchmarks.compensations [--json PATH]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.compensation import Call, Compensation, build_compensation
from vidaccel.configs.pattern_spec import CompensationSpec, PatternSpec
from vidaccel.kernels.torch_sparse import block_sparse_attention
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, Heads, StaticPattern, build_pattern, choose_blocks

from . import precision, report_rows
from .precision import GRID, NOISE_LEVELS, TILE, Tensors, captured

RULES: tuple[CompensationSpec, ...] = (
    CompensationSpec("none"),
    CompensationSpec("pooled_tail"),
    CompensationSpec.make("rectification", gain_aware=True),
    CompensationSpec.make("rectification", gain_aware=False),
    CompensationSpec("compensation_token"),
    CompensationSpec.make("merged_keys", parts=4),
    CompensationSpec.make("merged_keys", parts=16),
    CompensationSpec.make("delta", queries=1),
    CompensationSpec.make("delta", queries=1, nearest=True),
    CompensationSpec.make("delta", queries=4, nearest=True),
    CompensationSpec.make("rettention", period=5, growth=0.0),
    CompensationSpec.make("rettention", period=5, growth=0.04),
)
DENSITIES = (0.5, 0.25, 0.11)
#: Windows of 4x3x3 tiles: the same frames or the same rows, .50; three tiles of frames in the same rows, .25; and the
#: same place in all frames, .11.
WINDOWS = {
    0.5: PatternSpec.make(
        "union",
        patterns=[
            PatternSpec.make("sliding_tile", window=[1, 3, 3]),
            PatternSpec.make("sliding_tile", window=[4, 1, 3]),
        ],
    ),
    0.25: PatternSpec.make("sliding_tile", window=[3, 1, 3]),
    0.11: PatternSpec.make("sliding_tile", window=[4, 1, 1]),
}
#: A fiftieth of the way from noise to clip.
STEP = 0.02


@dataclass(frozen=True)
class Row:
    """One cell: the mean error, and the density that the calls came to."""

    rule: str
    pattern: str
    aimed: float
    kept: float
    density: float
    error: float


def patterns() -> list[tuple[str, float, PatternSpec]]:
    """(name, density, pattern) of every column."""
    found = [
        (name, density, PatternSpec.make(name, density=density))
        for name in ("pooled_top_k", "error_routing")
        for density in DENSITIES
    ]
    return found + [("window", density, WINDOWS[density]) for density in DENSITIES]


def call_of(sample: Tensors, spec: PatternSpec, memory: dict[str, Any], step: int = 0) -> Call:
    """A call on captured q, k, v [1,S,H,D], as the engine makes it."""
    layout = TokenLayout.of(GRID, TILE)
    heads = Heads(*sample, layout, step=step)
    pattern = build_pattern(spec)
    if isinstance(pattern, DynamicPattern):
        mask = BlockMask.from_dense(choose_blocks(pattern, heads))
    else:
        assert isinstance(pattern, StaticPattern)
        mask = pattern.mask(layout)

    def run(mask: BlockMask, *, tail: bool = False, return_lse: bool = False) -> Any:
        return block_sparse_attention(*sample, layout, mask, tail=tail, return_lse=return_lse)

    return Call(heads, mask, mask.density(layout), run, memory)


def errors_of(out: torch.Tensor, sample: Tensors) -> list[float]:
    """|out - dense| / |dense| of each head."""
    q, k, v = (x.transpose(1, 2) for x in sample)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    apart = (out.transpose(1, 2) - dense).flatten(2).norm(dim=-1) / dense.flatten(2).norm(dim=-1)
    found: list[float] = apart.flatten().tolist()
    return found


def runs_of_steps() -> list[list[Tensors]]:
    """Calls of five neighbouring steps from each noise level on, one list for each level and layer."""
    runs: list[list[Tensors]] = []
    for level in NOISE_LEVELS:
        steps = []
        for number in range(5):
            # the same seed for each step: the same clip and noise, so that only the level changes
            with mock.patch.object(precision, "NOISE_LEVELS", (level - number * STEP,)):
                steps.append(captured(torch.Generator().manual_seed(0)))
        runs += [list(calls) for calls in zip(*steps, strict=True)]
    return runs


def one(rule: Compensation, spec: PatternSpec, runs: Sequence[Sequence[Tensors]]) -> tuple[float, float, float]:
    """Error, density and kept share over all runs.

    A rule that remembers sees the steps of a run in turn, and its full ones do not count for the error; the others see
    the first step of each.
    """
    errors: list[float] = []
    densities, kept = [], []
    for steps in runs:
        memory: dict[str, Any] = {}
        for number, sample in enumerate(steps if rule.stateful else steps[:1]):
            call = call_of(sample, spec, memory, number)
            out = rule.attend(call)
            densities.append(call.density)
            kept.append(call.share)
            if number or not rule.stateful:
                errors += errors_of(out, sample)
    return statistics.fmean(errors), statistics.fmean(densities), statistics.fmean(kept)


def measure() -> list[Row]:
    """Every rule with every pattern."""
    rows = []
    runs = runs_of_steps()
    for spec in RULES:
        rule = build_compensation(spec)
        for name, aimed, pattern in patterns():
            error, density, kept = one(rule, pattern, runs)
            rows.append(Row(str(spec), name, aimed, kept, density, error))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a rule, one column for each pattern and density; the least error of a column in bold."""
    columns = list(dict.fromkeys((row.pattern, row.aimed) for row in rows))
    least = {c: min(row.error for row in rows if (row.pattern, row.aimed) == c) for c in columns}
    head = ["Compensation", "pairs", *(f"{name} {aimed:.2f}" for name, aimed in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for rule in dict.fromkeys(row.rule for row in rows):
        own = {(row.pattern, row.aimed): row for row in rows if row.rule == rule}
        more = statistics.fmean(row.density - row.kept for row in own.values())
        cells = [f"`{rule}`", f"+{more:.3f}" if more > 0.0005 else "0"]
        for column in columns:
            text = f"{own[column].error:.3f}"
            cells.append(f"**{text}**" if own[column].error == least[column] else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.compensations``."""
    report_rows.run(__doc__, measure, table, arguments)


if __name__ == "__main__":
    main()
