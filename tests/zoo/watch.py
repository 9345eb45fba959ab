"""Watches a model's video self-attention without knowing its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["GRID", "VideoAttention", "video_calls"]

#: Token grid of the pipelines of the zoo when they begin.
GRID = (3, 3, 5)
#: At least so many tokens has a sequence with video in it (ChronoEdit ends on 2 frames); all others are shorter.
VIDEO = 30


class VideoAttention(TorchFunctionMode):
    """Hands the query [B, H, S, D] of each self-attention that is long enough for the video to ``seen``."""

    def __init__(self, seen: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
            query, key = named["query"], named["key"]
            if query.shape == key.shape and query.shape[2] >= VIDEO:
                self.seen(query)
        return func(*args, **kwargs)


@contextmanager
def video_calls(models: list[Any]) -> Iterator[list[int]]:
    """The lengths of the video self-attention calls inside these models' forward passes, in order."""
    lengths: list[int] = []
    inside = 0

    def step(by: int) -> None:
        nonlocal inside
        inside += by

    def seen(query: torch.Tensor) -> None:
        if inside:
            lengths.append(query.shape[2])

    with ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_pre_hook(lambda *_: step(1)).remove)
            stack.callback(model.register_forward_hook(lambda *_: step(-1)).remove)
        stack.enter_context(VideoAttention(seen))
        yield lengths
