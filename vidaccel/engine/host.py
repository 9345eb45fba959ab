"""Attention by a plan for code that is no diffusers pipeline: a hand-written DiT loop, or a server with its own models.

::

    attention = vidaccel.Attention("sta")
    for sigma in sigmas:
        for layer, block in enumerate(blocks):
            q, k, v = block.project(x)                                    # [B, S, H, D]
            x = block.finish(attention(q, k, v, grid=(21, 30, 52), noise_level=sigma, layer=layer))
    print(attention.report())

No diffusers is imported.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..configs.plan import BRANCHES, TRANSFORMERS, Plan
from ..configs.presets import resolve_plan
from ..errors import ConfigError, KernelError, LayoutError
from ..layout import TokenLayout
from ..types import VideoGrid
from .attend import attend
from .context import ForwardContext, PatchedTransformer
from .prepare import check_plan, is_stateful, needs_curvature
from .runs import DenoisingRun
from .session import Session
from .site import AttentionSite, over_all_tokens
from .stats import Report

__all__ = ["Attention", "attention", "attention_plugin"]

#: Arguments of :func:`attention` that a plugin's ``params`` may hold.
_PARAMS = ("plan", "grid", "noise_level", "layer", "transformer", "branch", "before", "mask", "tiled")


class Attention:
    """Self-attention of one model by a plan; remembers what patterns and compensations want to find again.

    Args:
        plan: a preset's name, the path of a plan file, or a :class:`Plan`.
        strict: raise :class:`StrictError` where a call cannot run as planned, instead of running it dense and
            reporting it.
        kernel: name of the kernel to use, or ``None`` for the best one that can run.

    Raises:
        ConfigError: if the plan is not valid, follows the outputs of a whole model, or has a step cache.
    """

    def __init__(self, plan: str | Path | Plan, *, strict: bool = False, kernel: str | None = None) -> None:
        resolved = resolve_plan(plan)
        check_plan(resolved)
        if needs_curvature(resolved):
            raise ConfigError(
                f"plan {resolved.name!r} follows how the model's outputs change from step to step, which attention"
                " calls do not show; patch a pipeline with it, or give another plan"
            )
        if resolved.cache is not None:
            raise ConfigError(
                f"plan {resolved.name!r} has the step cache {resolved.cache}, which skips blocks of a whole model;"
                " patch a pipeline with it, or set Plan.cache to None"
            )
        self._session = Session(resolved, strict=strict, kernel=kernel)
        self._transformers: dict[str, PatchedTransformer] = {}
        self._sites: dict[tuple[str, int], AttentionSite] = {}
        self._thread = threading.local()
        self._lock = threading.Lock()

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        grid: VideoGrid | Sequence[int],
        noise_level: float,
        layer: int = 0,
        transformer: str = "transformer",
        branch: str | None = None,
        before: int = 0,
        mask: torch.Tensor | None = None,
        tiled: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        """One layer's attention.

        Args:
            q, k, v: [B, S, H, D] after norms and RoPE, any strides. The video's tokens in raster order (frames, height,
                width); other tokens before or behind it attend everything and are always attended.
            grid: the video's token grid, (frames, height, width) after patchify.
            noise_level: 1 is pure noise, 0 is clean. A rise starts a new generation, and memories are empty then; where
                that does not tell, :meth:`new_run` does.
            layer: number of the layer, counted from 0. A number that is no larger than that of the call before, of the
                same transformer and branch, begins a new forward pass.
            transformer: ``"transformer"`` or ``"transformer_2"``, for models of two experts.
            branch: ``"cond"`` or ``"uncond"`` where guidance takes separate calls.
            before: how many of the other tokens precede the video.
            mask: bool [B, S], true for valid tokens: padding at the end of each sample, or ``None``.
            tiled: whether the video's tokens are in the order of :meth:`layout` already, so that nothing is reordered.
            scale: multiplies q k^T, 1/sqrt(D) by default.

        Returns:
            [B, S, H, D], in the order the tokens came in.

        Raises:
            LayoutError: if the shapes do not fit together.
            ConfigError: if the noise level, branch or transformer is not valid.
            StrictError: in strict mode, if the call cannot run as planned.
        """
        grid = _grid(grid)
        if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
            raise LayoutError(
                f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; self-attention needs three"
                " [B,S,H,D] tensors of one shape"
            )
        others = q.shape[1] - grid.tokens
        if not 0 <= before <= others:
            raise LayoutError(
                f"q has {q.shape[1]} tokens, of which {before} precede a {grid} video of {grid.tokens}; give the grid"
                " after patchify and the number of other tokens before it"
            )
        if not 0.0 <= noise_level <= 1.0:
            raise ConfigError(f"the noise level is {noise_level!r}; valid is 0 (clean) to 1 (pure noise)")
        for name, found, valid in (("branch", branch, (None, *BRANCHES)), ("transformer", transformer, TRANSFORMERS)):
            if found not in valid:
                raise ConfigError(f"{name} is {found!r}; valid are {', '.join(map(str, valid))}")
        site = self._site(transformer, layer)
        run = self._session.runs.current(None)
        # the passes that go on in this thread: those of guidance may take turns in each layer
        passes: dict[Any, tuple[Any, int, ForwardContext]] = self._thread.__dict__.setdefault("passes", {})
        this = (run, noise_level, grid, before, tiled)
        going = passes.get((transformer, branch))
        if going is None or going[0] != this or layer <= going[1]:
            moment = run.observe(noise_level, transformer, name=branch)
            context = self._session.enter(site.transformer, moment, run, grid, tiled=tiled, before=before)
        else:
            context = going[2]
        passes[transformer, branch] = this, layer, context
        site.transformer.context = context
        if scale is not None:  # kernels know one scale, that of the head dimension
            q = q * (scale * math.sqrt(q.shape[-1]))
        return attend(site, q, k, v, mask)

    def new_run(self) -> DenoisingRun:
        """Begins a new denoising run, whose memories are empty; see :meth:`.session.Session.new_run`."""
        return self._session.new_run()

    def layout(self, grid: VideoGrid | Sequence[int], device: torch.device | str = "cpu") -> TokenLayout:
        """Token order and blocks of the plan: ``layout.tile(x)`` puts tokens [B, S, C] in order, ``untile`` back."""
        return TokenLayout.of(_grid(grid), self._session.plan.tile, device=device)

    def report(self) -> Report:
        """What ran so far: density, seconds and fallbacks per layer."""
        return self._session.report()

    def _site(self, transformer: str, layer: int) -> AttentionSite:
        with self._lock:
            if transformer not in self._transformers:
                self._transformers[transformer] = PatchedTransformer(transformer, joint=True)
            if (transformer, layer) not in self._sites:
                patched = self._transformers[transformer]
                site = self._session.add_site(patched, layer, f"{transformer}.{layer}", _dense)
                self._sites[transformer, layer] = site
            return self._sites[transformer, layer]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: VideoGrid | Sequence[int],
    plan: str | Path | Plan,
    noise_level: float,
    **where: Any,
) -> torch.Tensor:
    """One call of :class:`Attention`, whose arguments it takes, for plans that remember nothing between calls.

    Raises:
        ConfigError: also if a pattern or compensation of the plan remembers earlier calls.
    """
    return _stateless(resolve_plan(plan))(q, k, v, grid=grid, noise_level=noise_level, **where)


def attention_plugin(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Mapping[str, Any] | Any,
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """The same in the form that serving engines call sparse attention plugins in.

    Args:
        q, k, v: [B, S, H, D].
        params: the arguments of :func:`attention` as a mapping or as attributes: ``plan``, ``grid``, ``noise_level``,
            and what else of them is known.
        is_causal: must be false; video self-attention has no causal order.
        softmax_scale: multiplies q k^T.

    Raises:
        KernelError: if ``is_causal``.
        ConfigError: if ``params`` lacks one of the three, or a mapping has an unknown key.
    """
    if is_causal:
        raise KernelError("is_causal is true, but a plan is for video self-attention, which has no causal order")
    if isinstance(params, Mapping):
        unknown = sorted(set(params) - set(_PARAMS))
        if unknown:
            raise ConfigError(f"params has unknown keys {', '.join(map(str, unknown))}; valid are {', '.join(_PARAMS)}")
        given = dict(params)
    else:
        given = {name: getattr(params, name) for name in _PARAMS if hasattr(params, name)}
    missing = [name for name in _PARAMS[:3] if given.get(name) is None]
    if missing:
        raise ConfigError(f"params lacks {', '.join(missing)}; a plan needs to know the video's grid and noise level")
    return attention(q, k, v, scale=softmax_scale, **given)


@lru_cache(maxsize=8)
def _stateless(plan: Plan) -> Attention:
    for policy in dict.fromkeys(head for rule in plan.rules for head in rule.policy.heads):
        if is_stateful(policy):
            raise ConfigError(
                f"{policy} of plan {plan.name!r} remembers earlier calls, which one call cannot; make a"
                " vidaccel.Attention(plan) for each model and call that"
            )
    return Attention(plan)


def _grid(grid: VideoGrid | Sequence[int]) -> VideoGrid:
    if isinstance(grid, VideoGrid):
        return grid
    if len(grid) != 3:
        raise LayoutError(f"grid is {grid!r}; give (frames, height, width) in tokens")
    return VideoGrid(*(int(extent) for extent in grid))


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    mask = over_all_tokens(mask, q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
