"""The same model with a dense attention that masks token pairs, as the oracle of a sparse plan.

The original processors run; only torch's own attention function is intercepted while one of them is active, and given
a boolean mask over tokens in the model's order, made from the pattern's block mask.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vidaccel import Plan, TokenLayout, VideoGrid
from vidaccel.patchers.base import Family
from vidaccel.patterns.registry import build_pattern

__all__ = ["masked"]


@dataclass
class _Pass:
    """What is known of the forward pass that runs."""

    grid: VideoGrid | None = None
    before: int | None = 0
    inside: bool = False


class _Masking(TorchFunctionMode):
    def __init__(self, plan: Plan, now: _Pass) -> None:
        super().__init__()
        self.plan, self.now = plan, now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention or not self.now.inside:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(_sdpa).bind(*args, **(kwargs or {}))
        query, key = bound.arguments["query"], bound.arguments["key"]
        if query.shape == key.shape:
            keep = self._keep(query.shape[1], query.shape[2])
            given = bound.arguments.get("attn_mask")
            if given is not None:
                assert given.dtype == torch.bool
                keep = keep & given
            bound.arguments["attn_mask"] = keep
        return func(**bound.arguments)

    def _keep(self, heads: int, tokens: int) -> torch.Tensor:
        """Token pairs that may attend, [1, heads, S, S]: all that are not two video tokens of a dropped block."""
        grid = self.now.grid
        assert grid is not None
        layout = TokenLayout.of(grid, self.plan.tile)
        policy = self.plan.rules[0].policy
        before = tokens - grid.tokens if self.now.before is None else self.now.before
        keep = torch.ones(1, heads, tokens, tokens, dtype=torch.bool)
        video = slice(before, before + grid.tokens)
        for head in range(heads):
            blocks = build_pattern(policy.for_head(head, heads).pattern).blocks(layout)
            pairs = blocks[layout.block_of_token][:, layout.block_of_token]
            keep[0, head, video, video] = pairs[layout.inverse][:, layout.inverse]
        return keep


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> None:
    """The signature of torch's function, which has none of its own."""


@contextmanager
def masked(family: Family, model: Any, plan: Plan) -> Iterator[None]:
    """``model`` attends as ``plan``'s first rule says, by a token mask."""
    now = _Pass()
    parameters = inspect.signature(type(model).forward)

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        call = parameters.bind_partial(module, *args, **kwargs).arguments
        grid = family.grid(module, call)
        assert isinstance(grid, VideoGrid), grid
        now.grid, now.before = grid, family.before(module, call)

    hook = model.register_forward_pre_hook(enter, with_kwargs=True)
    layers = list(family.attention_layers(model))
    originals = [module.processor for _, module in layers]
    for _, module in layers:
        module.processor = _flagging(module.processor, now)
    try:
        with _Masking(plan, now):
            yield
    finally:
        hook.remove()
        for (_, module), original in zip(layers, originals, strict=True):
            module.processor = original


def _flagging(original: Any, now: _Pass) -> Any:
    """``original`` with its signature, which several attention modules of diffusers read."""

    @functools.wraps(type(original).__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        now.inside = True
        try:
            return original(*args, **kwargs)
        finally:
            now.inside = False

    return type("Flagging", (type(original),), {"__call__": call, "__init__": lambda self: None})()
