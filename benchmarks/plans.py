"""Plans side by side on the small model: the same prompts and seeds for all, so that differences are paired.

    python -m benchmarks.plans --plans sta,radial --prompts examples/held-out.txt [--limit N] [--json PATH]

A plan is a preset's name or a plan file. Every prompt runs dense once and by every plan; the figures are those of the
plan's video against the dense one. With ``--against PLAN`` the table also has the paired difference in PSNR to that
plan, with its 95% interval over prompts: an interval that does not hold 0 is a difference that more luck would not
turn round. Seconds are of this machine in this run, and only good for comparing plans of one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from vidaccel.configs.plan import Plan
from vidaccel.configs.presets import resolve_plan
from vidaccel.device import device_info
from vidaccel.files import check_writable, write_json
from vidaccel.pipelines.demo import DEFAULTS, DEMO_DIR
from vidaccel.pipelines.generate import Generation, Request, generate
from vidaccel.pipelines.load import load_pipeline
from vidaccel.pipelines.patch import patch
from vidaccel.quality import mean_interval
from vidaccel.quality.figures import quality_figures

__all__ = ["interval", "measure", "named_plans", "open_demo", "read_requests", "run_plan", "table", "timed"]

Row = dict[str, Any]


def measure(pipe: Any, plans: dict[str, Plan], requests: list[Request]) -> list[Row]:
    """One row a prompt and plan: figures against the dense run of that prompt, density and seconds."""
    rows = []
    for number, request in enumerate(requests):
        dense = generate(pipe, request)
        names = list(plans)
        # the order turns from prompt to prompt, so that none always runs on the warmer machine
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rows.append(
                {"prompt": request.prompt, "seed": request.seed, **run_plan(pipe, name, plans[name], request, dense)}
            )
        print(f"{number + 1} of {len(requests)}: {request.prompt}", flush=True)
    return rows


def run_plan(pipe: Any, name: str, plan: Plan, request: Request, dense: Generation) -> Row:
    """Figures of one request by a plan, against its dense generation."""
    session = patch(pipe, plan, strict=True)
    try:
        made, processor = timed(pipe, request)
        report = session.report()
    finally:
        session.close()
    return {
        "plan": name,
        **quality_figures(made, dense),
        "density": report.density,
        "calls": report.calls,
        "attention_seconds": report.attention_seconds,
        "seconds": made.seconds["total"],
        "processor_seconds": processor,
        "dense_seconds": dense.seconds["total"],
    }


def timed(pipe: Any, request: Request) -> tuple[Generation, float]:
    """A generation and the processor time it took, which other work on the machine hardly changes."""
    began = time.process_time()
    made = generate(pipe, request)
    return made, time.process_time() - began


def table(rows: list[Row], against: str | None) -> str:
    """A Markdown table of means with 95% intervals over prompts."""
    names = list(dict.fromkeys(row["plan"] for row in rows))
    head = ["plan", "density", "PSNR, dB", "SSIM", "latent error", "flicker", "seconds / dense"]
    head += [f"PSNR of {against} minus this"] if against else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    base = {(row["prompt"], row["seed"]): row["psnr"] for row in rows if row["plan"] == against}
    for name in names:
        own = [row for row in rows if row["plan"] == name]
        ratio = statistics.median(row["seconds"] / row["dense_seconds"] for row in own)
        cells = [f"`{name}`", f"{statistics.fmean(row['density'] for row in own):.3f}"]
        cells += [interval([row[key] for row in own], digits) for key, digits in _COLUMNS]
        cells.append(f"{ratio:.2f}")
        if against:
            apart = [base[(row["prompt"], row["seed"])] - row["psnr"] for row in own]
            cells.append("" if name == against else interval(apart, 2, sign=True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_COLUMNS = (("psnr", 1), ("ssim", 3), ("latent_error", 3), ("flicker", 2))


def interval(values: list[float], digits: int, *, sign: bool = False) -> str:
    """A mean with its 95% interval."""
    found = mean_interval(values)
    if found.mean is None:
        return "identical"
    text = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return text if found.low is None else f"{text} ± {found.mean - found.low:.{digits}f}"


def named_plans(texts: str) -> dict[str, Plan]:
    """Plans by short names, from names and files separated by commas."""
    return {Path(text).stem if "/" in text or "." in text else text: resolve_plan(text) for text in texts.split(",")}


def open_demo() -> Any:
    """The small model in float32 on the CPU."""
    pipe = load_pipeline(str(DEMO_DIR), dtype=torch.float32, device=torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_requests(prompts: Path, limit: int | None, seed: int, **more: Any) -> list[Request]:
    """What to generate of a file's first prompts, each with the next seed; ``more`` goes to the pipeline's call."""
    lines = (line.strip() for line in prompts.read_text(encoding="utf-8").splitlines())
    texts = [line for line in lines if line and not line.startswith("#")][:limit]
    arguments = {name: value for name, value in DEFAULTS.items() if name != "fps"} | more
    return [Request(text, seed + number, arguments) for number, text in enumerate(texts)]


def main() -> None:
    """Entry point of ``python -m benchmarks.plans``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", required=True, help="names or files, separated by commas")
    parser.add_argument("--prompts", type=Path, required=True, help="one a line; # begins a remark")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--seed", type=int, default=5000, help="of the first prompt; each further one has the next")
    parser.add_argument("--against", help="one of the plans")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json is not None:
        check_writable(options.json)
    plans = named_plans(options.plans)
    against = None if options.against is None else Path(options.against).stem
    if against is not None and against not in plans:
        parser.error(f"--against is {options.against}, which is none of {', '.join(plans)}")
    rows = measure(open_demo(), plans, read_requests(options.prompts, options.limit, options.seed))
    print(table(rows, against))
    if options.json is not None:
        write_json(options.json, {"environment": device_info().to_dict(), "rows": rows})


if __name__ == "__main__":
    main()
