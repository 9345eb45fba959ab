"""Step caches of diffusers beside plans, on the small model: what each costs, what it saves, and both together.

    python -m benchmarks.caches --plans dense,sta --prompts examples/held-out.txt --json caches.json [--limit N]
    python -m benchmarks.caches --table caches.json [--into docs/PERFORMANCE.md]

Every prompt runs dense, and then by every plan with every cache; the figures are those of the video against the dense
one without a cache. Rows are written down one by one, and the same command goes on after a kill. Seconds are processor
time over that of the prompt's dense run, with which other work on the machine hardly interferes. "Attention calls" says
which share of the dense run's self-attention calls really ran: a cache that skips blocks skips them too.

The model has few layers and its schedule few steps. A cache gains by skipping steps that hardly differ from the one
before, so it has less to skip here than at the 50 steps of a large model: read the rows against each other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidaccel.configs.plan import Plan
from vidaccel.files import atomic_path, check_writable
from vidaccel.pipelines.generate import Request

from .plans import interval, named_plans, open_demo, read_requests, run_plan, timed
from .system_runs import protocol
from .system_store import Store, read_rows
from .system_tables import put_into

__all__ = ["CACHES", "MARKS", "measure", "table"]

Row = dict[str, Any]

#: What is measured where nothing is named: two settings of each that has one.
CACHES = "none,first-block:0.05,first-block:0.1,taylorseer:2,taylorseer:4,pab:2,faster:2,sea:0.25"
#: What stands around the table in a document.
MARKS = "<!-- caches: begin -->", "<!-- caches: end -->"
_KEY = ("plan", "cache", "prompt", "seed")
_COLUMNS = (("psnr", 1), ("ssim", 3), ("latent_error", 3), ("flicker", 2))


def measure(
    pipe: Any, plans: dict[str, Plan], caches: Sequence[str], requests: Sequence[Request], store: Store
) -> None:
    """Runs what the store does not have yet, prompt by prompt.

    Args:
        caches: as ``--cache`` takes them.
    """
    for number, request in enumerate(requests):
        rows: list[Row] = [
            {"plan": plan, "cache": cache, "prompt": request.prompt, "seed": request.seed}
            for cache in caches
            for plan in plans
        ]
        rows = [row for row in rows if not store.has(row)]
        if not rows:
            continue
        dense, processor = timed(pipe, request)
        turn = number % len(rows)  # so that none always runs on the warmer machine
        for row in rows[turn:] + rows[:turn]:
            plan = replace(plans[row["plan"]], cache=row["cache"])
            figures = run_plan(pipe, row["plan"], plan, request, dense)
            store.add({**figures, **row, "dense_processor_seconds": processor})
            print(f"{number + 1}/{len(requests)} {row['plan']} {row['cache']}: {figures['psnr']:.1f} dB", flush=True)


def table(rows: Sequence[Row]) -> str:
    """Markdown: means with 95% intervals over prompts, a line for each plan and cache."""
    calls = max(row["calls"] for row in rows)
    heads = ("plan", "cache", "PSNR, dB", "SSIM", "latent error", "flicker", "seconds / dense", "attention calls")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["plan"], row["cache"]), []).append(row)
    plans = list(dict.fromkeys(plan for plan, _ in groups))
    for (plan, cache), own in sorted(groups.items(), key=lambda item: plans.index(item[0][0])):
        cells = [f"`{plan}`", "none" if cache == "none" else f"`{cache}`"]
        cells += [interval([float(row[name]) for row in own], digits) for name, digits in _COLUMNS]
        cells.append(interval([row["processor_seconds"] / row["dense_processor_seconds"] for row in own], 2))
        cells.append(f"{statistics.fmean(row['calls'] for row in own) / calls:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    prompts = len({(row["prompt"], row["seed"]) for row in rows})
    return "\n".join([f"{prompts} prompt{'s' if prompts > 1 else ''}.", "", *lines])


def main() -> None:
    """Entry point of ``python -m benchmarks.caches``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", default="dense,sta,svg-static", help="names or files, separated by commas")
    parser.add_argument("--caches", default=CACHES, help="as --cache takes them, separated by commas")
    parser.add_argument("--prompts", type=Path, help="one a line; # begins a remark")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--steps", type=int, help="denoising steps, instead of the model's own number")
    parser.add_argument("--seed", type=int, default=5000, help="of the first prompt; each further one has the next")
    parser.add_argument("--json", type=Path, help="file of the rows; the run goes on where it was")
    parser.add_argument("--table", type=Path, help="only print the table of such a file")
    parser.add_argument("--into", type=Path, help="with --table: put it between the marks of this document")
    options = parser.parse_args()
    if options.table is not None:
        made = table(read_rows([options.table], _KEY))
        if options.into is None:
            print(made)
            return
        document = put_into(options.into.read_text(encoding="utf-8"), made, MARKS)
        with atomic_path(options.into) as temporary:
            temporary.write_text(document, encoding="utf-8")
        return
    if options.into is not None or options.prompts is None:
        parser.error("give --prompts to measure, or --table to print what was measured; --into needs --table")
    if options.json is not None:
        check_writable(options.json)
    more = {} if options.steps is None else {"num_inference_steps": options.steps}
    everything = read_requests(options.prompts, None, options.seed, **more)
    requests = everything[: options.limit]
    about = protocol([request.prompt for request in everything], options.seed)
    about |= {"arguments": dict(requests[0].arguments)}
    store = Store(options.json, about, _KEY)
    caches = options.caches.split(",")
    plans = named_plans(options.plans)
    for cache in caches:
        replace(Plan.dense(), cache=cache)  # a misspelt one is refused before anything runs
    measure(open_demo(), plans, caches, requests, store)
    print(table(store.rows))


if __name__ == "__main__":
    main()
