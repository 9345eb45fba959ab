"""Looks at trained weights and makes them the shipped ones.

``python -m vidaccel.pipelines.demo.ship --run runs/demo`` generates the twelve held-out prompts, reads the clips with
the template matcher, prints what it read and draws the contact sheet; with ``--into`` it also writes the weights, in
bfloat16, with a card that tells the result, into a model folder.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

from vidaccel.pipelines.demo import DEFAULTS
from vidaccel.pipelines.demo.build import build_scheduler, build_tokenizer, load_pipeline, save_pipeline
from vidaccel.pipelines.demo.card import HISTORY_FILE, LOG_FILE, SHEET_FILE, write_card
from vidaccel.pipelines.demo.clips import HELD_OUT, ClipSpec
from vidaccel.pipelines.demo.recognise import Reading, read_clip
from vidaccel.pipelines.demo.sheet import save_sheet


@torch.no_grad()
def generate_clips(
    pipeline: WanPipeline, prompts: Sequence[str], settings: Mapping[str, Any], *, first_seed: int = 0, batch: int = 4
) -> Tensor:
    """Generate one clip a prompt; prompt i has the seed ``first_seed + i``, whatever the size of the batches.

    Returns (prompt, 3, frames, height, width) in [-1, 1] on the CPU.
    """
    settings = dict(settings)
    negative = settings.pop("negative_prompt", "")
    clips = []
    for begin in range(0, len(prompts), batch):
        some = list(prompts[begin : begin + batch])
        seeds = range(first_seed + begin, first_seed + begin + len(some))
        video = pipeline(
            some,
            negative_prompt=[negative] * len(some),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **settings,
        ).frames
        clips.append(video.float().cpu().transpose(1, 2) * 2 - 1)
    return torch.cat(clips)


def describe(specs: Sequence[ClipSpec], readings: Sequence[Reading]) -> str:
    """A Markdown table of what was asked for and what was read, with the totals."""
    lines = ["| Prompt | Colour | Shape | Motion | In one piece | Shape overlap |", "|---|---|---|---|---|---|"]
    totals = dict.fromkeys(("colour", "shape", "motion"), 0)
    for spec, reading in zip(specs, readings, strict=True):
        agreement = reading.agrees(spec)
        words = [f"{'yes' if agreement[key] else f'no: {getattr(reading, key)}'}" for key in totals]
        for key in totals:
            totals[key] += agreement[key]
        figures = f"{reading.wholeness:.2f} | {reading.overlap:.2f}"
        lines.append(f"| {spec.caption} | {' | '.join(words)} | {figures} |")
    summary = ", ".join(f"{key} {count} of {len(specs)}" for key, count in totals.items())
    return "\n".join([f"Read by the template matcher in `recognise.py`: {summary}.", "", *lines])


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m vidaccel.pipelines.demo.ship``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that training wrote")
    parser.add_argument("--into", type=Path, help="model folder to replace; without it nothing is shipped")
    parser.add_argument("--sheet", type=Path, help="where to draw the contact sheet as well")
    parser.add_argument("--prompts", type=int, default=len(HELD_OUT), help="how many of the held-out prompts")
    parser.add_argument("--steps", type=int, default=DEFAULTS["num_inference_steps"])
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance_scale"])
    parser.add_argument("--flow-shift", type=float, help="default: as in the folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt")
    options = parser.parse_args(arguments)

    pipeline = load_pipeline(options.run)
    pipeline.tokenizer = build_tokenizer()
    if options.flow_shift is not None:
        pipeline.scheduler = build_scheduler(options.flow_shift)
    settings = {**DEFAULTS, "num_inference_steps": options.steps, "guidance_scale": options.guidance}
    specs = HELD_OUT[: options.prompts]
    clips = generate_clips(pipeline, [spec.caption for spec in specs], settings, first_seed=options.seed)
    findings = describe(specs, [read_clip(clip) for clip in clips])
    print(findings)
    captions = [spec.caption for spec in specs]
    if options.sheet is not None:
        save_sheet(options.sheet, list(clips), captions, columns=2 if len(specs) > 6 else 1)
    if options.into is not None:
        ship(pipeline, options.run, options.into, settings)
        save_sheet(options.into / SHEET_FILE, list(clips), captions, columns=2 if len(specs) > 6 else 1)
        write_card(options.into, findings)


def ship(pipeline: WanPipeline, run: Path, into: Path, settings: Mapping[str, Any]) -> None:
    """Write ``pipeline`` to the model folder ``into`` in bfloat16, with its defaults, log and history."""
    scheduler = pipeline.scheduler
    stored = WanPipeline.from_pretrained(run, torch_dtype=torch.bfloat16)  # keeps in float32 what must stay so
    stored.tokenizer, stored.scheduler = pipeline.tokenizer, scheduler
    save_pipeline(stored, into)
    (into / "defaults.json").write_text(json.dumps(dict(settings), indent=2) + "\n")
    for name in (LOG_FILE, HISTORY_FILE):
        if (run / name).exists():
            shutil.copyfile(run / name, into / name)
    for path in into.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
