"""The published systems at matched densities on the shipped small model: quality against dense, and planning's share.

Every system gets the same warm-up (dense while the noise level is above .943), the same prompts and seeds, and the same
share of token pairs in its sparse steps. What a system is controlled by, a density, a mass or a window, is found by
bisection on q, k and v captured from the model (``benchmarks.precision``); the table gives the density that came out.
``planning`` is the time spent on choosing blocks over the time of self-attention. ``radial`` is not here: on so small a
grid hardly any of its settings differ.

    python -m benchmarks.systems [--systems vsa-free svg-ear ...] [--densities .5 .35 .2] [--limit 8] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.device import device_info
from vidaccel.errors import ConfigError
from vidaccel.files import write_json
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, Heads, StaticPattern, build_pattern, choose_blocks
from vidaccel.types import TileShape

from .precision import GRID, Tensors, captured

__all__ = ["SYSTEMS", "Row", "System", "density_of", "match", "measure", "plan_of", "table"]

#: Published for sta: 12 of 50 steps at flow shift 5.
WARM_UP = 0.943
TILE, FLAT = TileShape(4, 4, 4), TileShape(1, 8, 16)
PROMPTS = Path(__file__).parent.parent / "examples" / "prompts.txt"


@dataclass(frozen=True)
class System:
    """A system with one knob.

    Args:
        make: the pattern for a setting of the knob; more of it keeps more.
        low, high: range of the knob.
        tile: blocks.
    """

    make: Callable[[float], PatternSpec]
    low: float
    high: float
    tile: TileShape = TILE


def _named(name: str, knob: str, **fixed: Any) -> Callable[[float], PatternSpec]:
    return lambda value: PatternSpec.make(name, **{knob: value, **fixed})


def _bands(width: float) -> PatternSpec:
    members = tuple(PatternSpec.make(f"{n}_band", width=width, min_coverage=0.33) for n in ("spatial", "temporal"))
    return PatternSpec.make("svg", patterns=members, sink=PatternSpec("first_frame_sink"))


def _near(mass: float) -> PatternSpec:
    window = PatternSpec.make("sliding_tile", window=(1, 1, 1))
    return PatternSpec.make("pooled_top_p", mass=mass, beyond=True, window=window)


def _window(share: float) -> PatternSpec:
    return PatternSpec.make("sliding_tile", window=(1.0, share, max(0.05, 0.6 * share)))


def _rectified(keep: float) -> PatternSpec:
    return PatternSpec.make("rectified", drop=round(1 - keep, 4), mass=0.3, neighbours=0)


def _reused(mass: float) -> PatternSpec:
    return PatternSpec.make("reuse", drift=0.1, pattern=PatternSpec.make("pooled_top_p", mass=mass))


SYSTEMS: dict[str, System] = {
    "sta": System(_window, 0.05, 1.0),
    "vsa-free": System(_named("pooled_top_k", "density"), 0.02, 1.0),
    "nabla": System(_near, 0.01, 1.0),
    "draft": System(_named("draft", "density"), 0.02, 1.0, FLAT),
    "rectified": System(_rectified, 0.02, 0.99),
    "svg": System(_bands, 0.05, 16.0, FLAT),
    "sparge": System(_named("sparge", "density", similarity=-0.1), 0.02, 1.0),
    "xattention": System(_named("xattention", "mass", stride=8), 0.01, 1.0),
    "minference": System(_named("minference", "density"), 0.02, 1.0),
    "hip": System(_named("hierarchical", "density"), 0.02, 1.0),
    "sale": System(lambda more: PatternSpec.make("sale", threshold=10.0**-more, rows=16), 0.0, 6.0),
    "anchor": System(_named("anchor", "margin"), 0.0, 20.0),
    "hash": System(_named("hash_buckets", "density"), 0.02, 1.0),
    "haste": System(_reused, 0.01, 1.0),
    "svg-ear": System(_named("error_routing", "density"), 0.02, 1.0),
}


@dataclass(frozen=True)
class Row:
    """One cell of the table, means over the prompts.

    Args:
        aimed: density asked for; ``density`` is what the sparse calls kept.
        latent_error: relative L2.
        planning: seconds of choosing blocks over those of self-attention.
    """

    system: str
    pattern: str
    precision: str
    aimed: float
    density: float
    psnr: float
    ssim: float
    latent_error: float
    planning: float
    prompts: int


def density_of(spec: PatternSpec, samples: Sequence[Tensors], tile: TileShape) -> float:
    """Share of token pairs that a pattern keeps, mean over captured calls in layout order of ``TILE``."""
    layout = TokenLayout.of(GRID, tile)
    pattern = build_pattern(spec)
    if isinstance(pattern, StaticPattern):
        return pattern.density(layout)
    assert isinstance(pattern, DynamicPattern)
    captured_in = TokenLayout.of(GRID, TILE)
    found = []
    for sample in samples:
        q, k, v = (x if layout is captured_in else layout.tile(captured_in.untile(x)) for x in sample)
        found.append(BlockMask.from_dense(choose_blocks(pattern, Heads(q, k, v, layout))).density(layout))
    return sum(found) / len(found)


def match(system: System, aimed: float, samples: Sequence[Tensors], *, rounds: int = 12) -> PatternSpec:
    """The setting of a system whose density on the samples is nearest to ``aimed``, by bisection."""
    low, high = system.low, system.high
    tried: dict[PatternSpec, float] = {}
    for _ in range(rounds):
        middle = (low + high) / 2
        spec = system.make(round(middle, 4))
        tried[spec] = found = density_of(spec, samples, system.tile)
        low, high = (middle, high) if found < aimed else (low, middle)
    return min(tried, key=lambda spec: abs(tried[spec] - aimed))


def plan_of(
    spec: PatternSpec, tile: TileShape, *, precision: str = "native", compensation: str = "pooled_tail"
) -> Plan:
    """The pattern in every layer, dense above :data:`WARM_UP`."""
    head = HeadPolicy(spec, precision, compensation)
    rules = (Rule(LayerPolicy((HeadPolicy(),)), noise=(WARM_UP, 1.0)), Rule(LayerPolicy((head,))))
    return Plan("systems", rules, tile=tile)


def measure(
    names: Sequence[str],
    densities: Sequence[float],
    *,
    limit: int = 8,
    precisions: Sequence[str] = ("native",),
    compensation: str = "pooled_tail",
    kernel: str | None = None,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """The table, system by system; 8-bit precisions need ``kernel="reference"`` where no other kernel has them."""
    unknown = sorted(set(names) - set(SYSTEMS))
    if unknown:
        raise ConfigError(f"no system is called {', '.join(unknown)}; valid are {', '.join(SYSTEMS)}")
    from vidaccel.engine import attend
    from vidaccel.pipelines.demo import DEMO_DIR
    from vidaccel.pipelines.demo.build import load_pipeline
    from vidaccel.pipelines.generate import Request, generate
    from vidaccel.pipelines.patch import patch
    from vidaccel.quality.figures import quality_figures

    pipe = load_pipeline(DEMO_DIR)
    arguments = json.loads((DEMO_DIR / "defaults.json").read_text(encoding="utf-8"))
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line and not line.startswith("#")][:limit]
    requests = [Request(prompt, seed, arguments) for seed, prompt in enumerate(prompts)]
    samples = captured(torch.Generator().manual_seed(0))
    dense = [generate(pipe, request) for request in requests]
    rows: list[Row] = []
    for name in names:
        system = SYSTEMS[name]
        for aimed in densities:
            spec = match(system, aimed, samples)
            for precision in precisions:
                figures: list[dict[str, float | None]] = []
                kept: list[float] = []
                shares: list[float] = []
                for request, exact in zip(requests, dense, strict=True):
                    plan = plan_of(spec, system.tile, precision=precision, compensation=compensation)
                    session = patch(pipe, plan, kernel=kernel, strict=True)
                    watch = _Watch(attend._chosen)
                    try:
                        with mock.patch.object(attend, "_chosen", watch):
                            run = generate(pipe, request)
                        report = session.report()
                    finally:
                        session.close()
                    figures.append(quality_figures(run, exact))
                    kept.append(1.0 if report.sparse_density is None else report.sparse_density)
                    shares.append(watch.seconds / report.attention_seconds)
                psnr, ssim, latent = (_mean([f[x] for f in figures]) for x in _FIGURES)
                row = Row(
                    name, str(spec), precision, aimed, _mean(kept), psnr, ssim, latent, _mean(shares), len(requests)
                )
                rows.append(row)
                tell(_line(row))
    return rows


_FIGURES = ("psnr", "ssim", "latent_error")


class _Watch:
    """A function that adds up the time it takes."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.seconds = run, 0.0

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return self.run(*arguments)
        finally:
            self.seconds += time.perf_counter() - began


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _line(row: Row) -> str:
    return (
        f"| `{row.system}` | {row.precision} | {row.aimed:.2f} | {row.density:.3f} | {row.psnr:.1f} | {row.ssim:.3f}"
        f" | {row.latent_error:.3f} | {row.planning:.0%} | `{row.pattern}` |"
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, best PSNR first within each density and precision."""
    head = "| System | Precision | Aimed | Density | PSNR, dB | SSIM | Latent error | Planning | Pattern |"
    ordered = sorted(rows, key=lambda row: (-row.aimed, row.precision, -row.psnr))
    return "\n".join([head, "|" + "---|" * 9, *map(_line, ordered)])


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.systems``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help="which of them; all by default")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.35, 0.2])
    parser.add_argument("--precisions", nargs="+", default=["native"])
    parser.add_argument("--compensation", default="pooled_tail", help="none drops skipped blocks")
    parser.add_argument("--kernel", help="by name, such as reference for 8-bit precisions on a CPU")
    parser.add_argument("--limit", type=int, default=8, help="prompts")
    parser.add_argument("--json", type=Path, help="write all figures and the environment there")
    options = parser.parse_args(arguments)
    rows = measure(
        options.systems,
        options.densities,
        limit=options.limit,
        precisions=options.precisions,
        compensation=options.compensation,
        kernel=options.kernel,
    )
    print(table(rows))
    if options.json:
        write_json(options.json, {"device": asdict(device_info()), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
