"""Memory of patched attention beside dense attention: ``python -m benchmarks.memory``.

For every preset: one attention call, at the moment of a run where the preset needs most, and one forward pass of a
random four-layer Wan transformer. The figure is the most bytes of tensors that are alive at one time beside the inputs
and weights, over the bytes of q; a run on several grids shows how it grows with the tokens. Planning is part of the
first call of each grid. On a CPU the bytes of live tensors are counted, on CUDA the allocator's peak is read.

    python -m benchmarks.memory [--plans sta,vidaccel] [--grids 8x16x16,8x16x32] [--heads 4] [--head-dim 32]
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vidaccel.configs.plan import Plan
from vidaccel.configs.presets import load_preset, preset_names, resolve_plan
from vidaccel.device import device_info
from vidaccel.engine.attend import attend
from vidaccel.engine.context import PatchedTransformer
from vidaccel.engine.runs import Moment
from vidaccel.engine.session import Session
from vidaccel.engine.site import AttentionSite
from vidaccel.files import check_writable, write_json
from vidaccel.layout import TokenLayout
from vidaccel.pipelines.patch import patch
from vidaccel.types import VideoGrid

from .live_bytes import Buffer, LiveBytes

__all__ = ["GRIDS", "Call", "Row", "measure_call", "measure_step", "moments", "table"]

GRIDS = (VideoGrid(8, 8, 16), VideoGrid(8, 16, 16), VideoGrid(8, 16, 32), VideoGrid(8, 32, 32))
_HEADS, _DIM = 4, 32
#: A layer that no preset keeps dense.
_LAYER = 3


@dataclass(frozen=True)
class Call:
    """The most memory that was alive while something ran.

    Args:
        peak: bytes beside the inputs.
        kept: bytes that stay when it is over, output included: caches, and what patterns remember.
        largest: the largest buffer; ``None`` on CUDA.
    """

    peak: int
    kept: int
    largest: Buffer | None


@dataclass(frozen=True)
class Row:
    """One preset on one grid; ``step`` of a plan that needs trained weights is ``None``."""

    plan: str
    grid: str
    tokens: int
    blocks: int
    q_bytes: int
    call: Call
    dense_call: Call
    step: Call | None
    dense_step: Call


def watched(run: Callable[[], Any], device: torch.device) -> Call:
    """Runs it and counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = run()
        torch.cuda.synchronize(device)
        call = Call(
            torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before, None
        )
        del out
        return call
    with torch.no_grad(), LiveBytes() as live:
        out = run()
        call = Call(live.peak, live.now, live.largest)
        del out
    return call


def moments(plan: Plan, visits: int = 2) -> Iterator[float]:
    """Noise levels of a run, descending: some in the middle of every bin that the plan treats by a rule of its own."""
    edges = sorted({0.0, 1.0, *(edge for rule in plan.rules for edge in rule.noise)}, reverse=True)
    for high, low in itertools.pairwise(edges):
        for visit in range(visits):
            yield high - (0.4 + 0.2 * visit / visits) * (high - low)


def weights_of(heads: int, dim: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random trained tensors of one layer, for the plans that take some; others do not look."""
    shapes = {
        "gate.weight": (heads * dim, heads * dim),
        "gate.bias": (heads * dim,),
        "projection.weight": (dim, dim),
        "projection.bias": (dim,),
        "seer.q": (heads, dim, 16),
        "seer.k": (heads, 3 * dim, 16),
    }
    draw = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=draw).to(device) for name, shape in shapes.items()}


def measure_call(
    plan: Plan, grid: VideoGrid, device: torch.device, heads: int = _HEADS, dim: int = _DIM, visits: int = 2
) -> Call:
    """The attention calls of one layer in one run, each counted for itself; the worst of them."""
    session = Session(plan, strict=True)
    site = session.add_site(PatchedTransformer("transformer"), _LAYER, "measured", _dense)
    trained = weights_of(heads, dim, device)
    site.weights = lambda _: trained
    draw = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, grid.tokens, heads, dim, generator=draw).to(device, dtype) for _ in range(3))
    hidden = q.flatten(2)
    calls = [
        watched(partial(_one, site, level, step, (q, k, v, hidden), grid), device)
        for step, level in enumerate(moments(plan, visits))
    ]
    largest = max((call.largest for call in calls if call.largest), key=lambda buffer: buffer.bytes, default=None)
    return Call(max(call.peak for call in calls), max(call.kept for call in calls), largest)


def _one(
    site: AttentionSite, level: float, step: int, inputs: tuple[torch.Tensor, ...], grid: VideoGrid
) -> torch.Tensor:
    run = site.session.runs.current(None)
    site.session.enter(site.transformer, Moment(level, step, None), run, grid, tiled=True)
    q, k, v, hidden = inputs
    return attend(site, q, k, v, None, hidden)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def measure_step(
    plan: Plan, grid: VideoGrid, device: torch.device, heads: int = _HEADS, dim: int = _DIM
) -> Call | None:
    """One forward pass of a random transformer on its second visit, at the noise level of the plan's last rule."""
    from diffusers import WanTransformer3DModel

    if plan.name == "seer":  # does not go without trained gates, which are for one model
        return None
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=dim, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=4 * heads * dim, num_layers=_LAYER + 1, rope_max_seq_len=256,
    ).eval().to(device)  # fmt: skip
    latents = torch.randn(1, 16, grid.frames, 2 * grid.height, 2 * grid.width).to(device)
    text = torch.randn(1, 8, 32).to(device)
    session = patch(model, plan)

    def step(level: float) -> torch.Tensor:
        found: torch.Tensor = model(latents, torch.tensor([1000 * level], device=device), text, return_dict=False)[0]
        return found

    *_, before, last = moments(plan)
    with torch.no_grad():
        step(before)
        call = watched(lambda: step(last), device)
    session.close()
    return call


def measure(plan: Plan, grid: VideoGrid, device: torch.device, dense: tuple[Call, Call], heads: int, dim: int) -> Row:
    """One row of the table."""
    layout = TokenLayout.of(grid, plan.tile)
    width = 4 if device.type == "cpu" else 2
    return Row(
        plan.name, str(grid), grid.tokens, layout.num_blocks, grid.tokens * heads * dim * width,
        measure_call(plan, grid, device, heads, dim), dense[0], measure_step(plan, grid, device, heads, dim), dense[1],
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """Peak over the bytes of q, by preset and grid, and what the largest buffer is."""
    grids = list(dict.fromkeys((row.grid, row.tokens) for row in rows))
    head = " | ".join(f"{grid} ({tokens})" for grid, tokens in grids)
    lines = [f"| plan | {head} | step, times dense | largest buffer |", "|---" * (len(grids) + 3) + "|"]
    for plan in dict.fromkeys(row.plan for row in rows):
        mine = [row for row in rows if row.plan == plan]
        calls = " | ".join(f"{row.call.peak / row.q_bytes:.1f}" for row in mine)
        last = mine[-1]
        step = "" if last.step is None else f"{last.step.peak / last.dense_step.peak:.2f}"
        lines.append(f"| {plan} | {calls} | {step} | {last.call.largest or ''} |")
    return "\n".join(lines)


def _grid(text: str) -> VideoGrid:
    return VideoGrid(*(int(extent) for extent in text.split("x")))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Memory of patched attention beside dense attention.")
    parser.add_argument("--plans", default=",".join(preset_names()), help="presets or plan files, comma-separated")
    parser.add_argument("--grids", default=",".join(map(str, GRIDS)), help="token grids, comma-separated")
    parser.add_argument("--heads", type=int, default=_HEADS)
    parser.add_argument("--head-dim", type=int, default=_DIM)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    if given.json is not None:
        check_writable(given.json)
    device = torch.device(given.device)
    rows = []
    for grid in map(_grid, given.grids.split(",")):
        plain = load_preset("dense")
        step = measure_step(plain, grid, device, given.heads, given.head_dim)
        assert step is not None
        dense = measure_call(plain, grid, device, given.heads, given.head_dim), step
        for plan in map(resolve_plan, given.plans.split(",")):
            rows.append(measure(plan, grid, device, dense, given.heads, given.head_dim))
            print(f"{rows[-1].plan} on {grid}: {rows[-1].call.peak / rows[-1].q_bytes:.1f} x q", flush=True)
    print(table(rows))
    if given.json is not None:
        write_json(given.json, {"environment": device_info().to_dict(), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
