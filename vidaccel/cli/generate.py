"""``vidaccel generate``: one video for each prompt, and beside it what made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from . import options as opt
from .arguments import call_arguments, check_early, input_files, read_image
from .prompts import read_prompts

if TYPE_CHECKING:
    from ..configs.plan import Plan
    from ..engine.session import Session
    from ..engine.stats import Report
    from ..pipelines.batch import Clip
    from ..pipelines.caches import Cache
    from ..pipelines.frame_rate import FrameRate
    from ..pipelines.generate import Generation, Request


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to show.")] = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", help="The same as the argument.", rich_help_panel=opt.VIDEO)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File with one prompt a line, or - for stdin: one clip each, into the folder --output. Finished clips"
            " are not made again; accelerate launch (or torchrun) -m vidaccel ... shares them among processes.",
            rich_help_panel=opt.VIDEO,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The .mp4 file [default: out.mp4], or a folder with --prompts [default: out].",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    model: opt.Model = None,
    plan: opt.PlanName = opt.DEFAULT_PLAN,
    strict: opt.Strict = False,
    allow_mismatch: opt.AllowMismatch = False,
    weights: opt.WeightFiles = None,
    cache: opt.StepCache = None,
    linear: opt.Linear = None,
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
    """Generate videos by a plan. Writes an H.264 .mp4, and beside it a .json with all settings and the report.

    A model's sound is in the file. More clips of one prompt (--arg num_videos_per_prompt=2) are out.mp4, out-2.mp4, ...
    """
    from ..pipelines.call_check import check_seed
    from ..pipelines.video import check_video_path

    many = prompts is not None
    if many and (prompt is not None or prompt_option is not None):
        raise ConfigError("there is a prompt beside --prompts FILE; add it to the file, or leave out one")
    texts = read_prompts(prompts, (), None) if many else [one_prompt(prompt, prompt_option)]
    check_seed(seed + len(texts) - 1)
    picture = read_image(image)
    check_early(model, context, picture, several=True)
    team = None
    if many:
        from .batch import Team, folder_for

        folder = folder_for(Path("out") if output is None else output)
        team = Team(device)
        device = team.device
    else:
        target = check_video_path(Path("out.mp4") if output is None else output)
        inputs = (*input_files(context).values(), opt.cache_file(cache))
        opt.check_outputs(target, target.with_suffix(".json"), read=inputs)
    chosen, stepping = opt.read_cache(cache, opt.read_linear(linear, opt.read_plan(plan)))
    trained = opt.read_weight_files(weights)
    opened = opt.open_pipeline(model, dtype=dtype, device=device, lora=lora, cpu_offload=cpu_offload, compile=compile)
    from ..pipelines.batch import clip_paths
    from ..pipelines.call_check import check_call
    from ..pipelines.frame_rate import FrameRate
    from ..pipelines.generate import Request
    from ..pipelines.patch import patch

    arguments = call_arguments(opened, context, picture)
    requests = [Request(text, seed + number, arguments) for number, text in enumerate(texts)]
    session = patch(opened.pipe, chosen, strict=strict, allow_mismatch=allow_mismatch, weights=trained)
    check_call(opened.pipe, arguments, several=True)
    if team is None:
        opt.check_outputs(*clip_paths(target, arguments.get("num_videos_per_prompt", 1)), read=inputs)
    rate = opened.frame_rate(arguments) if fps is None else FrameRate(fps)
    asked = num_frames if num_frames is not None or "num_frames" in opened.defaults else arguments.get("num_frames")
    work = _Work(opened, chosen, session, stepping, asked, rate, input_files(context))
    if team is None:
        opened.pipe.set_progress_bar_config(desc="generating", disable=None)  # None: only where there is a terminal
        typer.echo(work.make(requests[0], target)[1])
        return
    from ..pipelines.batch import clips_of
    from .batch import about, make_all

    opened.pipe.set_progress_bar_config(disable=True)

    def make(clip: Clip) -> dict[str, Any]:
        return work.make(clip.request, clip.video, fingerprint=clip.fingerprint)[0]

    loras, parts = list(lora or ()), list(weights or ())
    settings: dict[str, Any] = {"model": opened.name, "dtype": dtype, "loras": loras, "weights": parts}
    settings |= {"cache": cache, "fps": rate.fps}
    try:
        make_all(clips_of(requests, folder, about(chosen, settings)), team, folder, make)
    finally:
        team.close()


@dataclass(frozen=True)
class _Work:
    """A patched pipeline that makes one clip after the other."""

    opened: opt.Opened
    plan: Plan
    session: Session
    cache: Cache | None
    num_frames: int | None
    rate: FrameRate
    inputs: dict[str, str]

    def make(self, request: Request, target: Path, **more: Any) -> tuple[dict[str, Any], str]:
        """Generates a clip and writes it and its .json; returns its figures, and all that is to be told about it."""
        from ..files import write_json
        from ..pipelines.batch import clip_paths
        from ..pipelines.caches import enabled
        from ..pipelines.generate import generate, num_steps
        from ..pipelines.video import write_video

        self.session.reset_stats()
        with enabled(self.opened.pipe, self.cache, num_steps(self.opened.pipe, request)):
            made = generate(self.opened.pipe, request, several=True)
        report = self.session.report()
        notes = self._notes(made, request, report)
        paths = clip_paths(target, len(made.videos))
        for path, video in zip(paths, made.videos, strict=True):
            write_video(path, video.frames, self.rate.fps, video.sound)
        names = [path.name for path in paths]
        content: dict[str, Any] = {
            "file": target.name,
            "files": names,
            "fps": self.rate.fps,
            "plan": self.plan.name,
            "model": self.opened.name,
        }
        content |= {"cache": self.plan.cache if self.cache is None else str(self.cache)}
        content |= {"linear": None if self.plan.linear is None else str(self.plan.linear)}
        content |= {"inputs": self.inputs} if self.inputs else {}
        content |= {**made.settings, "seconds": made.seconds, "notes": notes, "report": report.to_dict()}
        beside = target.with_suffix(".json")
        write_json(beside, {**content, "machine": opt.machine(), **more})
        count, rows, columns, _ = made.frames.shape
        stages = ", ".join(f"{stage} {made.seconds[stage]:.2f}" for stage in ("text", "denoise", "decode"))
        sound = "" if made.videos[0].sound is None else f" and {made.videos[0].sound}"
        files = ", ".join(map(str, paths))
        each = "" if len(paths) == 1 else "each "
        where = f"{files}: {each}{count} frames of {columns}x{rows}{sound} in {made.seconds['total']:.2f} s ({stages})"
        where += f"; {beside}"
        figures = {
            "files": names,
            "seconds": round(made.seconds["total"], 3),
            "density": report.density,
            "notes": notes,
        }
        return figures, "\n".join([str(report), *(f"note: {note}" for note in notes), where])

    def _notes(self, made: Generation, request: Request, report: Report) -> list[str]:
        from ..pipelines.generate import unknown_words
        from ..pipelines.video import even_size_note

        count, rows, columns, _ = made.frames.shape
        notes = [note for note in (even_size_note(rows, columns), frames_note(self.num_frames, count)) if note]
        notes += made.notes
        notes += [] if self.rate.note is None else [self.rate.note]
        own = self.opened.frame_rate(request.arguments)
        if made.videos[0].sound is not None and own.fps != self.rate.fps:
            notes.append(
                f"the sound is made for {own.fps:g} frames per second and the file has {self.rate.fps:g}, so it does"
                " not go with the pictures"
            )
        notes += unknown_words(self.opened.pipe, request.prompt)
        if not (self.plan.is_dense or report.sparse_calls or report.fallbacks):
            notes.append(
                f"nothing ran sparse: {self.plan.name} is dense at these noise levels, or its patterns keep all of so"
                " small a video"
            )
        return notes


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
