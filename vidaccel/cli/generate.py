"""``vidaccel generate``: one prompt, one video, and beside it what made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import options as opt


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to show.")] = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", help="The same as the argument.", rich_help_panel=opt.VIDEO)
    ] = None,
    output: opt.VideoOutput = Path("out.mp4"),
    model: opt.Model = None,
    plan: opt.PlanName = opt.DEFAULT_PLAN,
    strict: opt.Strict = False,
    allow_mismatch: opt.AllowMismatch = False,
    negative_prompt: opt.NegativePrompt = None,
    height: opt.Height = None,
    width: opt.Width = None,
    num_frames: opt.NumFrames = None,
    num_inference_steps: opt.NumInferenceSteps = None,
    guidance_scale: opt.GuidanceScale = None,
    seed: opt.Seed = 0,
    image: opt.Image = None,
    arg: opt.Arg = None,
    fps: opt.Fps = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    lora: opt.Lora = None,
    cpu_offload: opt.CpuOffload = False,
    compile: opt.Compile = False,
) -> None:
    """Generate a video by a plan. Writes an H.264 .mp4, and beside it a .json with all settings and the report."""
    from ..files import check_writable, write_json
    from ..pipelines.video import check_video_path, even_size_note, write_video

    text = one_prompt(prompt, prompt_option)
    target = check_writable(check_video_path(output))
    beside = check_writable(target.with_suffix(".json"))
    chosen = opt.read_plan(plan)
    picture = opt.read_image(image)
    opened = opt.open_pipeline(model, dtype=dtype, device=device, lora=lora, cpu_offload=cpu_offload, compile=compile)
    from ..pipelines.generate import Request, unknown_words
    from ..pipelines.generate import generate as run
    from ..pipelines.patch import patch

    request = Request(text, seed, opt.call_arguments(opened, context, picture))
    opened.pipe.set_progress_bar_config(desc="generating", disable=None)  # None: only where there is a terminal
    session = patch(opened.pipe, chosen, strict=strict, allow_mismatch=allow_mismatch)
    made = run(opened.pipe, request)
    report = session.report()

    rate = opened.fps if fps is None else fps
    count, rows, columns, _ = made.frames.shape
    notes = [note for note in (even_size_note(rows, columns), frames_note(num_frames, count)) if note]
    notes += unknown_words(opened.pipe, text)
    if not (chosen.is_dense or report.sparse_calls or report.fallbacks):
        notes.append(
            f"nothing ran sparse: {chosen.name} is dense at these noise levels, or its patterns keep all of so small"
            " a video"
        )
    write_video(target, made.frames, rate)
    content = {"file": target.name, "fps": rate, "plan": chosen.name, "model": opened.name, **made.settings}
    content |= {"seconds": made.seconds, "notes": notes, "report": report.to_dict(), "machine": opt.machine()}
    write_json(beside, content)

    typer.echo(str(report))
    for note in notes:
        typer.echo(f"note: {note}")
    stages = ", ".join(f"{stage} {made.seconds[stage]:.2f}" for stage in ("text", "denoise", "decode"))
    typer.echo(f"{target}: {count} frames of {columns}x{rows} in {made.seconds['total']:.2f} s ({stages}); {beside}")


def one_prompt(argument: str | None, option: str | None) -> str:
    """The prompt, given either way.

    Raises:
        ConfigError: it is given both ways, or not at all.
    """
    if argument is not None and option is not None:
        raise ConfigError("the prompt is given twice, as argument and as --prompt; leave out one")
    prompt = argument if argument is not None else option
    if prompt is None or not prompt.strip():
        raise ConfigError('there is no prompt; give one, for example vidaccel generate "a red circle moving left"')
    return prompt


def frames_note(asked: int | None, returned: int) -> str | None:
    """Says so if the pipeline returned another number of frames than the user asked for."""
    if asked is None or asked == returned:
        return None
    return f"{asked} frames were asked for and the pipeline returned {returned}; all {returned} are in the file"
