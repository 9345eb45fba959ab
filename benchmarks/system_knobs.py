"""The published systems as plans with one knob, and the setting of the knob that keeps a given share of token pairs.

One line of :data:`SYSTEMS` is one system. A setting is found twice: on q, k and v captured from the small model, which
takes seconds, and then on a real generation (:func:`matched`), because a run that is sparse itself has other queries
and keys, other noise levels, and patterns that remember.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vidaccel.blockmask import BlockMask
from vidaccel.configs.pattern_spec import CompensationSpec, PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.configs.presets import load_preset
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, Heads, build_pattern
from vidaccel.types import TileShape
from vidaccel.variablemask import VariableBlockMask

from .precision import GRID, Tensors

__all__ = ["NATIVE_ONLY", "PRESETS", "SYSTEMS", "Calls", "System", "Try", "chosen", "matched", "nearest", "plan_of"]

#: Published for sta: 12 of 50 steps at flow shift 5.
WARM_UP = 0.943
TILE, FLAT, DEEP = TileShape(4, 4, 4), TileShape(1, 8, 16), TileShape(8, 1, 16)
LINES, SQUARES = TileShape(1, 2, 64), TileShape(1, 8, 8)


@dataclass(frozen=True)
class System:
    """A system with one knob.

    Args:
        make: what runs in the sparse steps for a setting of the knob, for every head of every layer alike, or a whole
            plan for a system that differs by noise level; more of the knob keeps more token pairs.
        low, high: range of the knob; equal for a system that has none.
        tile: blocks, where ``make`` gives no plan of its own.
        first: setting to begin with where only a run tells the density (skipping inside the kernel, dense steps in
            between); ``None`` = found on captured calls.
        edition: one more each time the system's rule or blocks change, so that rows measured before say so.
    """

    make: Callable[[float], HeadPolicy | Plan]
    low: float
    high: float
    tile: TileShape = TILE
    first: float | None = None
    edition: int = 1


def _pattern(name: str, knob: str, **fixed: Any) -> Callable[[float], PatternSpec]:
    """A pattern with the knob as one of its parameters."""
    return lambda value: PatternSpec.make(name, **{knob: value, **fixed})


def _with(
    pattern: Callable[[float], PatternSpec], compensation: str = "pooled_tail", **params: Any
) -> Callable[[float], HeadPolicy]:
    """A pattern with a compensation."""
    spec = CompensationSpec.make(compensation, **params)
    return lambda value: HeadPolicy(pattern(value), compensation=spec)


def _bands(share: float) -> PatternSpec:
    """SVG's two kinds with the sinks of their own; what is compared stays two frames wide, as published."""

    def kinds(**width: Any) -> tuple[PatternSpec, ...]:
        return tuple(
            PatternSpec.make("union", patterns=(PatternSpec.make(band, min_coverage=0.33, **width), sink))
            for band, sink in (
                ("spatial_band", PatternSpec("first_frame_sink")),
                ("temporal_band", PatternSpec.make("first_places_sink", min_coverage=0.33)),
            )
        )

    return PatternSpec.make("svg", patterns=kinds(width=share, unit="video"), profiles=kinds(width=2.0, unit="frames"))


def _near(mass: float) -> PatternSpec:
    """NABLA beside the own block alone: of so small a grid its window of 11x3x3 blocks keeps over half."""
    window = PatternSpec.make("sliding_tile", window=(1, 1, 1), inward=False)
    return PatternSpec.make("pooled_top_p", mass=mass, beyond=True, window=window)


def _window(share: float) -> PatternSpec:
    return PatternSpec.make("sliding_tile", window=(1.0, share, max(0.05, 0.6 * share)))


def _kept(keep: float) -> PatternSpec:
    return PatternSpec.make("rectified", drop=round(1 - keep, 4), mass=0.3, neighbours=0)


def _reused(mass: float) -> PatternSpec:
    return PatternSpec.make("reuse", drift=0.1, pattern=PatternSpec.make("pooled_top_p", mass=mass))


def _preset(name: str, _: float) -> Plan:
    """A preset that has no knob, as it is below the common warm-up."""
    return load_preset(name)


def _neighbourhood(factor: float, *, exact: bool) -> PatternSpec:
    """GNA's published window, as shares of the axes, made larger or smaller in all of them."""
    window = tuple(min(1.0, round(share * factor, 4)) for share in (0.6, 0.5, 0.3))
    return PatternSpec.make("neighborhood", window=window, stride="tile", **({"exact": True} if exact else {}))


def _shards(keep: float) -> PatternSpec:
    return PatternSpec.make("shards", stride=max(1, round(1 / keep)), near=0)


def _clustered(density: float) -> PatternSpec:
    return PatternSpec.make("clustered", pattern=PatternSpec.make("error_routing", density=density))


def _ear(**clusters: float) -> Callable[[float], PatternSpec]:
    return _pattern("svg_ear", "density", exact=True, **clusters)


def _along_hilbert(keep: float) -> PatternSpec:
    return PatternSpec.make("ordered", order="hilbert", pattern=_kept(keep))


def _skipping(more: float) -> HeadPolicy:
    """BLASST's threshold is skip / L, published from 1e-6 to .7; each unit of the knob makes it ten times smaller."""
    return HeadPolicy(skip=10.0 ** (3.2 - more))


_TOP_K = _pattern("pooled_top_k", "density")

#: ``radial`` is not here: on so small a grid hardly any of its settings differ. Neither are systems that are nothing
#: without trained weights (``vsa``, ``sla``, ``seer``).
SYSTEMS: dict[str, System] = {
    "dense": System(lambda _: HeadPolicy(), 1.0, 1.0),
    # windows
    "sta": System(_with(_window), 0.05, 1.0),
    "neighborhood": System(_with(partial(_neighbourhood, exact=False)), 0.2, 3.4),
    "gna": System(_with(partial(_neighbourhood, exact=True), "none"), 0.2, 3.4),
    "s2": System(_with(_shards), 0.02, 1.0),
    # blocks by their means
    "vsa-free": System(_with(_TOP_K), 0.02, 1.0),
    "nabla": System(_with(_near), 0.01, 1.0, SQUARES, edition=2),
    "draft": System(_with(_pattern("draft", "density")), 0.02, 1.0, FLAT, edition=2),
    "rectified": System(_with(_kept, "rectification", gain_aware=True), 0.02, 0.99),
    "rectified-tail": System(_with(_kept), 0.02, 0.99),
    "rectified-hilbert": System(_with(_along_hilbert, "rectification", gain_aware=True), 0.02, 0.99),
    "sparge": System(_with(_pattern("sparge", "density", similarity=-0.1)), 0.02, 1.0),
    "hip": System(_with(_pattern("hierarchical", "density")), 0.02, 1.0),
    "svg-ear": System(_with(_pattern("error_routing", "density")), 0.02, 1.0),
    # clusters
    "svg2": System(_with(_pattern("svg2", "mass", least=0.0, exact=True)), 0.01, 1.0),
    "svg2-blocks": System(_with(_pattern("svg2", "mass", least=0.0)), 0.01, 1.0),
    "svg-ear-clusters": System(_with(_ear(queries=0.004, keys=0.0132)), 0.01, 1.0),
    "svg-ear-fine": System(_with(_ear(keys=0.0313)), 0.01, 1.0),
    "svg-ear-runs": System(_with(_clustered), 0.02, 1.0),
    # from tokens
    "xattention": System(_with(_pattern("xattention", "mass", stride=8)), 0.01, 1.0, edition=2),
    "svg": System(_with(_bands), 0.01, 1.0, LINES, edition=2),
    "minference": System(_with(_pattern("minference", "density")), 0.02, 1.0),
    "sale": System(_with(lambda more: PatternSpec.make("sale", threshold=10.0**-more, rows=16)), 0.0, 6.0),
    "anchor": System(_with(_pattern("anchor", "margin")), 0.0, 20.0),
    "hash": System(_with(_pattern("hash_buckets", "density")), 0.02, 1.0),
    # over time
    "haste": System(_with(_reused), 0.01, 1.0),
    "stochastic": System(_with(_pattern("stochastic_top_k", "density", temperature=0.3)), 0.02, 1.0),
    "pasa": System(_with(_pattern("pasa", "density", temperature=0.3)), 0.02, 1.0),
    # compensations
    "vsa-dropped": System(_with(_TOP_K, "none"), 0.02, 1.0),
    "rettention": System(
        _with(_pattern("temporal_band", "width", unit="video", min_coverage=0.2), "rettention"), 0.005, 1.0, DEEP
    ),
    "delta": System(_with(_window, "delta"), 0.05, 1.0),
    "razor": System(_with(_window, "compensation_token"), 0.05, 1.0),
    "tempcache": System(_with(_TOP_K, "merged_keys", parts=4), 0.02, 1.0),
    # inside the kernel
    "blasst": System(_skipping, 0.0, 8.0, first=1.5),
    # precisions, and a schedule of them with windows
    **{name: System(partial(_preset, name), 1.0, 1.0) for name in ("sage", "sage2", "sage2-int4", "sage3", "binary")},
    "fps": System(partial(_preset, "fps"), 1.0, 1.0),
}

#: Editions of presets measured as they are, where they are not what they were when they were first measured.
PRESETS: dict[str, int] = dict.fromkeys(
    (
        *("delta", "draft", "nabla", "radial", "razor", "rettention", "sale", "sla", "sta", "svg", "svg-static"),
        *("svg2", "xattention"),
    ),
    2,
)

#: Systems whose kernels have no other precision; in the tables' 8-bit parts ``svg2-blocks`` stands for svg2, and
#: ``svg-ear-runs`` for svg-ear-clusters.
NATIVE_ONLY = ("svg2", "svg-ear-clusters", "svg-ear-fine")


def plan_of(system: System, knob: float, *, precision: str = "native", compensation: str | None = None) -> Plan:
    """The system at one setting, dense while the noise level is above :data:`WARM_UP`.

    Args:
        precision: put on top of every head; ``"native"`` leaves the system its own.
        compensation: in place of the system's own; ``None`` leaves it.
    """
    made = system.make(knob)
    rules = made.rules if isinstance(made, Plan) else (Rule(LayerPolicy((made,))),)
    change = partial(_changed, precision=precision, compensation=compensation)
    rules = tuple(replace(r, policy=LayerPolicy(tuple(map(change, r.policy.heads)))) for r in rules)
    tile = made.tile if isinstance(made, Plan) else system.tile
    return Plan("systems", (Rule(LayerPolicy((HeadPolicy(),)), noise=(WARM_UP, 1.0)), *rules), tile=tile)


def _changed(head: HeadPolicy, *, precision: str, compensation: str | None) -> HeadPolicy:
    if precision != "native":
        head = replace(head, precision=precision)
    if compensation is not None and head.pattern.name != "dense":
        head = replace(head, compensation=CompensationSpec(compensation))
    return head


def chosen(pattern: DynamicPattern, heads: Heads) -> tuple[BlockMask | VariableBlockMask, Heads]:
    """What a pattern keeps, and the heads in the order of its blocks, which may be its own."""
    order = pattern.order(heads)
    heads = heads if order is None else heads.reordered(order)
    return pattern.mask(heads), heads


@dataclass(eq=False)
class Calls:
    """Captured calls, and the density that a setting has on them.

    Args:
        samples: q, k, v of each call, [B,S,H,D] in layout order of :data:`TILE`.
    """

    samples: Sequence[Tensors]
    _known: dict[HeadPolicy, float] = field(default_factory=dict)

    def density(self, system: System, knob: float) -> float:
        """Share of token pairs in the blocks that the system keeps, mean over the calls where it depends on them."""
        head = system.make(knob)
        assert isinstance(head, HeadPolicy), "a system that is a whole plan begins at 'first'"
        if head not in self._known:
            self._known[head] = self._measured(head.pattern, system.tile)
        return self._known[head]

    def _measured(self, spec: PatternSpec, tile: TileShape) -> float:
        layout, captured_in = TokenLayout.of(GRID, tile), TokenLayout.of(GRID, TILE)
        pattern = build_pattern(spec)
        aim = pattern.density(layout)
        if aim is not None:  # fixed by the grid, or by a number of blocks
            return aim
        assert isinstance(pattern, DynamicPattern)
        found = []
        for sample in self.samples:
            q, k, v = (x if layout is captured_in else layout.tile(captured_in.untile(x)) for x in sample)
            found.append(chosen(pattern, Heads(q, k, v, layout))[0].density(layout))
        return sum(found) / len(found)

    def knob(self, system: System, aimed: float, *, rounds: int = 12) -> float:
        """The setting whose density on these calls is nearest to ``aimed``, by bisection."""
        low, high = system.low, system.high
        tried: dict[float, float] = {}
        for _ in range(rounds):
            middle = round((low + high) / 2, 4)
            tried[middle] = found = self.density(system, middle)
            low, high = (middle, high) if found < aimed else (low, middle)
        return min(tried, key=lambda knob: abs(tried[knob] - aimed))


@dataclass(frozen=True)
class Try:
    """A setting, and the density that the sparse steps of a run had with it."""

    knob: float
    density: float


def matched(
    system: System,
    aimed: float,
    calls: Calls,
    run: Callable[[float], float],
    *,
    tries: int = 4,
    tolerance: float = 0.02,
) -> tuple[Try, ...]:
    """Settings tried on real runs, the last one not always the best: the one to use is :func:`nearest`.

    The secant goes over the density on captured calls, where that is known: a step of it is about the same step of a
    run's density, however the knob is bent. Else it goes over the knob itself.

    Args:
        run: density of the sparse steps of a run at a setting.
        tries: most runs.
        tolerance: relative deviation from ``aimed`` that ends the search.
    """
    alone = system.first is not None
    x = system.first if system.first is not None else aimed
    bounds = (system.low, system.high) if alone else (0.0, 1.0)
    found: list[tuple[float, Try]] = []
    seen: list[float] = []
    while len(found) < tries:
        knob = round(x, 6) if alone else calls.knob(system, x)
        expected = knob if alone else calls.density(system, knob)
        if expected in seen:
            break  # the system has no setting in between, or none that makes a difference
        seen.append(expected)
        found.append((x, Try(knob, run(knob))))
        density = found[-1][1].density
        foretold = not alone and abs(density / expected - 1) < 0.001  # then nothing else is nearer either
        if foretold or abs(density / aimed - 1) <= tolerance:
            break
        x = min(bounds[1], max(bounds[0], _next([(at, made.density) for at, made in found], aimed)))
    return tuple(made for _, made in found)


def _next(points: list[tuple[float, float]], aimed: float) -> float:
    """Where a curve through these (x, density) reaches ``aimed``: between the nearest two around it, else beyond."""
    below = [p for p in points if p[1] < aimed]
    above = [p for p in points if p[1] >= aimed]
    if below and above:
        (x0, d0), (x1, d1) = max(below, key=lambda p: p[1]), min(above, key=lambda p: p[1])
        return x0 + (x1 - x0) * (aimed - d0) / (d1 - d0)
    if len(points) > 1 and points[-1][1] != points[-2][1]:
        (x0, d0), (x1, d1) = points[-2:]
        slope = (x1 - x0) / (d1 - d0)
        if slope > 0:  # else noise of the run hides the slope
            return x1 + slope * (aimed - d1)
    x, density = points[-1]
    return x * aimed / max(density, 1e-6)


def nearest(tries: Sequence[Try], aimed: float) -> Try:
    """The try whose density is nearest to ``aimed``."""
    return min(tries, key=lambda made: abs(made.density - aimed))
