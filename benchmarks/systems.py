"""The published systems at matched densities on the shipped small model: quality against dense, and planning's share.

Every system gets the same warm-up (dense while the noise level is above .943), the same prompts and seeds, which
calibration does not see, and the same share of token pairs in its sparse steps. Its knob, a density, a mass or a
window, is found on the run itself (``benchmarks.system_knobs``); the table gives the density that came out, in the
sparse steps and over all steps. Intervals are of 95% over prompts, differences are paired: the same prompt and seed on
both sides. ``planning`` is the time spent on choosing blocks over the time of self-attention.

    python -m benchmarks.systems --json results.json [--systems vsa-free svg-ear ...] [--densities .5 .35 .2]
        [--precisions native int8 fp8-tile] [--limit 8] [--limit-8bit 8] [--shard 1/2] [--plans calibrated.safetensors]
    python -m benchmarks.systems --table results.json [--into docs/SYSTEMS.md]

A run that was killed goes on where it was. Two processes share the work with ``--shard 1/2`` and ``--shard 2/2`` and
the same ``--json``; each writes a file beside it, and ``--table`` reads them all. 8-bit precisions are emulated on a
CPU: their figures are right and their times mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vidaccel.configs.plan import Plan
from vidaccel.configs.presets import resolve_plan
from vidaccel.errors import ConfigError
from vidaccel.files import atomic_path, check_writable
from vidaccel.types import PRECISIONS

from .system_knobs import NATIVE_ONLY, SYSTEMS
from .system_runs import Model, measure, protocol
from .system_store import AS_IT_IS, Cell, Row, Store, read_rows
from .system_tables import put_into, tables

__all__ = ["PROMPTS", "cells_of", "main", "shard_of"]

PROMPTS = Path(__file__).parent.parent / "examples" / "held-out.txt"
SEED = 5000  # of the first prompt; each further one has the next, as in benchmarks.plans


def cells_of(
    names: Sequence[str],
    densities: Sequence[float],
    precisions: Sequence[str] = ("native",),
    *,
    compensation: str = "own",
    plans: Sequence[str] = (),
) -> list[Cell]:
    """The cells of the table in the order they are measured: all of a precision before the next.

    Raises:
        ConfigError: for a system or precision that does not exist, or a density out of range.
    """
    unknown = sorted(set(names) - set(SYSTEMS))
    if unknown:
        raise ConfigError(f"no system is called {', '.join(unknown)}; valid are {', '.join(SYSTEMS)}")
    strange = sorted(set(precisions) - set(PRECISIONS))
    if strange:
        raise ConfigError(f"no precision is called {', '.join(strange)}; valid are {', '.join(PRECISIONS)}")
    for density in densities:
        if not 0 < density < 1:
            raise ConfigError(f"a density to match is {density}; give shares of the token pairs above 0 and below 1")
    found: dict[Cell, None] = {}
    for precision in precisions:
        found |= {Cell(plan, AS_IT_IS, precision): None for plan in plans if precision == "native"}
        for aimed in densities:
            for name in names:
                if PRECISIONS[precision].quantised and name in NATIVE_ONLY:
                    continue
                free = SYSTEMS[name].low < SYSTEMS[name].high
                found[Cell(name, aimed if free else 1.0, precision, compensation)] = None
    # dense in the model's own precision is what everything is compared with
    return [cell for cell in found if (cell.system, cell.precision) != ("dense", "native")]


def shard_of(cells: Sequence[Cell], share: str) -> list[Cell]:
    """The part of the work that ``"1/2"`` means; cells with one knob stay together.

    Raises:
        ConfigError: if the text is not a number of a part and a number of parts.
    """
    number, _, parts = share.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise ConfigError(f"the share of the work is {share!r}; give for example 1/2 and 2/2")
    keys = list(dict.fromkeys(cell.knob_key for cell in cells))
    return [cell for cell in cells if keys.index(cell.knob_key) % int(parts) == int(number) - 1]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.systems``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help="which of them; all by default")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.35, 0.2])
    parser.add_argument("--precisions", nargs="+", default=["native"], help="on top of each system")
    parser.add_argument("--compensation", default="own", help="in place of each system's own; none drops blocks")
    parser.add_argument("--plans", nargs="+", default=[], help="preset names or plan files, measured as they are")
    parser.add_argument("--kernel", help="by name, instead of the cheapest that has the precision")
    parser.add_argument("--limit", type=int, default=8, help="prompts")
    parser.add_argument("--limit-8bit", type=int, help="prompts for quantised precisions; as --limit by default")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one a line; # begins a remark")
    parser.add_argument("--shard", help="part of the work, such as 1/2")
    parser.add_argument("--json", type=Path, help="written after each generation, and read when a run is repeated")
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="measure nothing, print these files")
    parser.add_argument("--into", type=Path, help="with --table: put the tables between the marks of this document")
    options = parser.parse_args(arguments)
    if options.into and not options.table:
        parser.error("--into needs --table and the files to read")
    if options.table:
        made = tables(read_rows(options.table))
        print(made)
        if options.into:
            document = put_into(options.into.read_text(encoding="utf-8"), made)
            with atomic_path(options.into) as temporary:
                temporary.write_text(document, encoding="utf-8")
        return
    plans = {Path(text).stem if "." in text else text: resolve_plan(text) for text in options.plans}
    rows = _measured(options, plans)
    print(tables(rows))


def _measured(options: argparse.Namespace, plans: dict[str, Plan]) -> list[Row]:
    cells = cells_of(
        options.systems,
        options.densities,
        options.precisions,
        compensation=options.compensation,
        plans=list(plans),
    )
    path = options.json
    if options.shard:
        cells = shard_of(cells, options.shard)
        if path is not None:
            path = path.with_stem(f"{path.stem}-{options.shard.replace('/', 'of')}")
    if path is not None:
        check_writable(path)
    from vidaccel.pipelines.demo import DEFAULTS
    from vidaccel.pipelines.generate import Request

    lines = (line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    settings = {name: value for name, value in DEFAULTS.items() if name != "fps"}
    requests = [Request(text, SEED + number, settings) for number, text in enumerate(prompts)]
    few = options.limit if options.limit_8bit is None else options.limit_8bit
    store = Store(path, protocol(prompts, SEED))
    measure(
        Model(requests),
        cells,
        store,
        limits=lambda cell: min(len(requests), few if PRECISIONS[cell.precision].quantised else options.limit),
        kernel=options.kernel,
        plans=plans,
        tell=lambda line: print(line, flush=True),
    )
    return store.rows if path is None else read_rows([path])


if __name__ == "__main__":
    main()
