"""What ``calibrate`` and ``check`` generate: prompts and picture read before anything slow, the pipeline, requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from . import options as opt
from .arguments import call_arguments, check_early, read_image
from .prompts import read_prompts

if TYPE_CHECKING:
    from ..pipelines.generate import Request

__all__ = ["Inputs", "Ready"]


@dataclass(frozen=True)
class Ready:
    """An opened pipeline and what to call it with.

    Args:
        opened: the pipeline; its own progress bar is off.
        texts: the prompts.
        arguments: of every call.
    """

    opened: opt.Opened
    texts: Sequence[str]
    arguments: dict[str, Any]

    def requests(self, seed: int, most: int | None = None) -> list[Request]:
        """One request for each of the first ``most`` prompts; each has the next seed."""
        from ..pipelines.generate import Request

        return [Request(text, seed + number, self.arguments) for number, text in enumerate(self.texts[:most])]


@dataclass(frozen=True)
class Inputs:
    """What the options name, read but not opened."""

    context: typer.Context
    texts: Sequence[str]
    picture: Any

    @staticmethod
    def read(context: typer.Context, *, last_seed: int = 0) -> Inputs:
        """Reads prompts and picture of a command with the options of model and video.

        Args:
            last_seed: how far from --seed the first prompt's seed may lie; each further prompt has the next one.

        Raises:
            ConfigError: if there are no prompts, a file cannot be read, or a seed is too large.
        """
        from ..pipelines.call_check import check_seed

        given = context.params
        texts = read_prompts(given["prompts"], given["prompt"] or (), given["limit"])
        check_seed(given["seed"] + last_seed + len(texts) - 1)
        picture = read_image(given["image"])
        check_early(given["model"], context, picture)
        return Inputs(context, texts, picture)

    def open(self) -> Ready:
        """Loads the model."""
        given = {name: self.context.params[name] for name in ("dtype", "device", "lora", "cpu_offload")}
        opened = opt.open_pipeline(self.context.params["model"], **given)
        opened.pipe.set_progress_bar_config(disable=True)
        return Ready(opened, self.texts, call_arguments(opened, self.context, self.picture))
