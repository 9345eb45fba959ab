"""Options that several commands share, and their common start: plan and model checked, pipeline loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..types import SEEDS

if TYPE_CHECKING:
    from ..configs.plan import Plan
    from ..pipelines.caches import Cache
    from ..pipelines.frame_rate import FrameRate

#: Headings of the help.
MODEL, VIDEO, PLAN, OUTPUT = "Model", "Video (as in the pipeline's call)", "Plan", "Output"

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Pipeline folder or hub id [default: the small model that ships with vidaccel].",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16 [default: best for the device].", rich_help_panel=MODEL),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: best at hand].", rich_help_panel=MODEL)
]
Lora = Annotated[list[str] | None, typer.Option(help="LoRA file or hub id; may be repeated.", rich_help_panel=MODEL)]
CpuOffload = Annotated[
    bool, typer.Option("--cpu-offload", help="Keep parts on the device only while used.", rich_help_panel=MODEL)
]
Compile = Annotated[
    bool, typer.Option("--compile", help="torch.compile the transformer's blocks.", rich_help_panel=MODEL)
]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to show.", rich_help_panel=VIDEO)]
Height = Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=VIDEO)]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=VIDEO)]
NumFrames = Annotated[int | None, typer.Option(min=1, help="Frames to ask the pipeline for.", rich_help_panel=VIDEO)]
NumInferenceSteps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.", rich_help_panel=VIDEO)]
GuidanceScale = Annotated[float | None, typer.Option(help="Strength of the prompt.", rich_help_panel=VIDEO)]
Image = Annotated[Path | None, typer.Option(help="First frame, for image-to-video pipelines.", rich_help_panel=VIDEO)]
Arg = Annotated[
    list[str] | None,
    typer.Option(
        "--arg", metavar="NAME=VALUE", help="Any other argument of the pipeline's call, as JSON or plain text;"
        " NAME=@FILE reads a picture, a video or a folder of pictures. May be repeated.",
        rich_help_panel=VIDEO,
    ),
]  # fmt: skip
Seed = Annotated[int, typer.Option(min=SEEDS[0], max=SEEDS[1], help="Of the starting noise.", rich_help_panel=VIDEO)]
Fps = Annotated[
    float | None,
    typer.Option(min=0.1, help="Frames per second [default: the model's].", rich_help_panel=OUTPUT),
]
VideoOutput = Annotated[Path, typer.Option("--output", "-o", help="The .mp4 file.", rich_help_panel=OUTPUT)]
Strict = Annotated[
    bool, typer.Option("--strict", help="Fail where a layer cannot run as planned.", rich_help_panel=PLAN)
]
AllowMismatch = Annotated[
    bool,
    typer.Option("--allow-mismatch", help="Use a plan made for another model, with a warning.", rich_help_panel=PLAN),
]
WeightFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--weights", metavar="[NAME=]PATH", help="Trained parts of the plan's system: a .safetensors file or a folder"
        " of them; with two transformers one for each, by name.", rich_help_panel=PLAN,
    ),
]  # fmt: skip
StepCache = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="NAME[:VALUE]", help="A step cache of diffusers beside the plan: first-block:0.08,"
        " taylorseer:5, pab:2, faster:2, sea:0.25 or mag:RATIOS.json; none for none [default: the plan's].",
        rich_help_panel=PLAN,
    ),
]  # fmt: skip
Linear = Annotated[
    str | None,
    typer.Option(
        "--linear", metavar="PRECISION", help="Linear layers of the blocks in int8 or fp8, by torchao; none for none"
        " [default: the plan's].", rich_help_panel=PLAN,
    ),
]  # fmt: skip

#: The plan where none is given, the same as that of ``vidaccel.patch``.
DEFAULT_PLAN = "sta"
PlanName = Annotated[
    str, typer.Option("--plan", help="Preset name or plan file; dense = as without vidaccel.", rich_help_panel=PLAN)
]


@dataclass(frozen=True)
class Opened:
    """A loaded pipeline and what belongs to it.

    Args:
        pipe: the pipeline.
        name: folder or hub id, as given; ``"demo"`` for the shipped model.
        defaults: call arguments of this model, for what the user leaves out.
        fps: frames per second of its videos, where neither its call nor its family says.
    """

    pipe: Any
    name: str
    defaults: Mapping[str, Any]
    fps: float | None = None

    def frame_rate(self, arguments: Mapping[str, Any]) -> FrameRate:
        """The rate of what the pipeline makes of these arguments."""
        from ..pipelines.frame_rate import FrameRate, frame_rate

        return frame_rate(self.pipe, arguments) if self.fps is None else FrameRate(self.fps)


def read_plan(name: str) -> Plan:
    """The plan of that name or file, before anything slow is started."""
    from ..configs.presets import resolve_plan

    return resolve_plan(name)


def read_cache(text: str | None, plan: Plan) -> tuple[Plan, Cache | None]:
    """The plan, and the cache of ``--cache``; where that is given, the plan has none of its own any more."""
    from ..pipelines.caches import read_cache as read

    return (plan, None) if text is None else (replace(plan, cache=None), read(text))


def cache_file(text: str | None) -> Path | None:
    """The file that ``--cache`` names, if it names one."""
    name, _, value = (text or "").partition(":")
    return Path(value) if name == "mag" and value else None


def read_linear(text: str | None, plan: Plan) -> Plan:
    """The plan with the Linears of ``--linear``, where that is given."""
    from ..configs.linear import linear_plan

    return plan if text is None else replace(plan, linear=linear_plan(text))


def read_weight_files(texts: Sequence[str] | None) -> str | dict[str, str] | None:
    """What ``vidaccel.patch`` takes as weights, from ``--weights``; the paths exist."""
    from ..configs.plan import TRANSFORMERS

    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals and name in TRANSFORMERS else ("", text)
        if not Path(path).exists():
            raise ConfigError(f"--weights is {text!r}, and there is no {path}; give a .safetensors file or a folder")
        if name in found or (found and "" in {name, *found}):
            raise ConfigError(
                f"--weights is given {len(texts or ())} times; give one path, or one for each transformer as"
                f" {'=PATH or '.join(TRANSFORMERS)}=PATH"
            )
        found[name] = path
    return found.get("", found) or None


def open_pipeline(
    model: str | None,
    *,
    dtype: str | None,
    device: str | None,
    lora: Sequence[str] | None = None,
    cpu_offload: bool = False,
    compile: bool = False,
) -> Opened:
    """Load a model, the shipped one if ``model`` is ``None``, and prepare it as the options say."""
    from ..device import default_dtype, device_info, find_device
    from ..pipelines.demo import DEFAULTS, DEMO_DIR
    from ..pipelines.load import check_model, compile_transformers, load_pipeline, parse_dtype

    if model == "":
        raise ConfigError("--model is empty; give a pipeline's folder or a hub id, or leave it out")
    if not sys.stderr.isatty():
        _without_loading_bars()
    name = check_model(DEMO_DIR if model is None else model)
    is_demo = Path(name).resolve() == Path(DEMO_DIR).resolve()
    where = find_device(device_info().default_device if device is None else device)
    kind = parse_dtype(dtype) if dtype is not None else default_dtype(where)
    pipe = load_pipeline(name, dtype=kind, device=where, loras=lora or (), cpu_offload=cpu_offload)
    if compile:
        compile_transformers(pipe)
    defaults = dict(DEFAULTS) if is_demo else {}
    return Opened(pipe, "demo" if is_demo else name, defaults, defaults.pop("fps", None))


def check_outputs(*paths: Path | None, read: Sequence[str | Path | None] = ()) -> None:
    """Raises an error, before any work is done, unless all of these files can be written and none is meant twice.

    Args:
        paths: files to be written.
        read: files that the same command reads; none of them may be written over.
    """
    from ..files import check_writable

    seen: dict[Path, Path] = {}
    for path in paths:
        if path is None:
            continue
        check_writable(path)
        if seen.setdefault(path.resolve(), path) is not path:
            raise ConfigError(f"{path} is named for two files; give each a name of its own")
    for given in read:
        if given is not None and (path := seen.get(Path(given).resolve())) is not None:
            raise ConfigError(f"the output {path} is a file that this command reads; give it another name")


def machine() -> dict[str, Any]:
    """What decides the figures: versions and hardware, JSON-able."""
    from ..device import device_info

    found = device_info().to_dict()
    return {name: found[name] for name in ("vidaccel", "python", "packages", "cpu", "cores", "gpus")}


def _without_loading_bars() -> None:
    """Keeps the bars of diffusers and transformers out of logs."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
