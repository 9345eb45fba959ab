"""One pipeline of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Case"]


def _first(out: Any) -> torch.Tensor:
    value = out[0]
    assert isinstance(value, torch.Tensor)
    return value


@dataclass(frozen=True)
class Case:
    """How to build a pipeline, how to call it, and where its latents come out.

    Args:
        pipeline: class name; with a suffix after a dash where one class has several cases.
        build: makes the pipeline from tiny random components, through its real class. Seeded by the caller.
        call: all arguments of one seeded call of two or three steps, ``output_type="latent"`` where there is one.
        two: what to change in them for two prompts (of different lengths where lengths matter); ``None`` if the
            pipeline takes only one.
        output: the tensor to compare, from what the call returns.
        sparse: whether the family can run this pipeline sparse; else ``reason`` is part of why it cannot.
    """

    pipeline: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    two: Callable[[], dict[str, Any]] | None = None
    output: Callable[[Any], torch.Tensor] = _first
    sparse: bool = True
    reason: str = ""

    def __str__(self) -> str:
        return self.pipeline

    def make(self) -> Any:
        """The pipeline, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, **overrides: Any) -> torch.Tensor:
        """What a seeded call gives."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.output(pipe(**{**self.call(), **overrides}))
