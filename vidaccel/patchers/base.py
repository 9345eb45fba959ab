"""What every family shares: entering a forward pass, reordering tokens once, swapping processors, and undoing it all.

Only nn hooks are used. diffusers' own hooks do not survive ``enable_model_cpu_offload``, and class-wide patches would
leak into other pipelines.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from ..engine.ops import handle_for
from ..engine.session import Session, TransformerState
from ..errors import StrictError
from ..layout import TokenLayout
from ..types import VideoGrid

__all__ = ["Family", "SparseProcessor", "TokenOrder", "patch_transformer"]


class SparseProcessor:
    """Base of our attention processors: carries the layer's handle and the backend that dense calls use.

    Subclasses name every argument of ``__call__``: several attention modules of diffusers drop keyword arguments that
    the processor's signature does not name.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        # set by diffusers' set_attention_backend and enable_parallelism, on whatever processor sits in the layer
        self._attention_backend = getattr(original, "_attention_backend", None)
        self._parallel_config = getattr(original, "_parallel_config", None)
        self.handle = torch.empty(0, dtype=torch.int64)

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What the original processor runs on q, k, v [B, S, H, D]."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out: torch.Tensor = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out

    def restore(self, module: Any) -> None:
        """Puts the original processor back, with the backend the user may have chosen meanwhile."""
        for setting in ("_attention_backend", "_parallel_config"):
            if getattr(self.original, setting, None) is not getattr(self, setting):
                setattr(self.original, setting, getattr(self, setting))
        module.processor = self.original


class TokenOrder:
    """Hooks that put tokens in layout order where they enter the block stack, and back where they leave it.

    They sit outside the stack, because caches skip blocks and model parallelism cuts between them.
    """

    def __init__(self, state: TransformerState) -> None:
        self._state = state

    def _layout(self, x: torch.Tensor) -> TokenLayout:
        return self._state.layout(x.device)

    def tile_volume(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of a patch embedding with output [B, C, T, H, W], which the model flattens next."""
        if not self._state.tiled:
            return None
        return self._layout(out).tile(out.flatten(2), dim=2).unflatten(2, out.shape[2:])

    def tile_tables(self, module: nn.Module, args: Any, out: tuple[torch.Tensor, ...]) -> Any:
        """Forward hook of a RoPE module with tables [1, S, 1, D]."""
        if not self._state.tiled:
            return None
        return tuple(self._layout(table).tile(table, dim=1) for table in out)

    def untile_tokens(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Forward pre-hook of the final norm, which takes [B, S, C]."""
        if not self._state.tiled:
            return None
        x, *rest = args
        return (self._layout(x).untile(x, dim=1), *rest)


class Family(ABC):
    """One kind of video transformer. A subclass says what is special; :func:`patch_transformer` does the rest.

    Attributes:
        name: short name for tables.
        transformers: class names of the transformers, as diffusers spells them. Matched by name, because copies of a
            class in other modules are not subclasses.
        pipelines: class names of the pipelines that use them.
        processors: class names of the attention processors we know how to replace.
        token_order: where the video tokens sit in the sequence.
        stays_dense: what is never touched, and why, in one phrase.
        separate_guidance: whether the unconditional pass is a second forward pass (and not half of the batch).

    Models are typed ``Any``, because the attributes that make a transformer are diffusers' own and untyped.
    """

    name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]
    pipelines: ClassVar[tuple[str, ...]]
    processors: ClassVar[tuple[str, ...]]
    token_order: ClassVar[str]
    stays_dense: ClassVar[str]
    separate_guidance: ClassVar[bool]

    def matches(self, model: object) -> bool:
        """Whether ``model`` is a transformer of this family, or a subclass of one."""
        return any(cls.__name__ in self.transformers for cls in type(model).__mro__)

    @abstractmethod
    def attention_layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """(qualified name, module) of each video self-attention, in layer order."""

    @abstractmethod
    def left_alone(self, model: Any) -> Iterator[dict[str, str]]:
        """Attention that is dense by design, as {"module", "reason"} for the report."""

    @abstractmethod
    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        """Token grid of a forward call given its arguments by name, or one sentence on why it cannot be known."""

    @abstractmethod
    def tiles_once(self, model: Any, call: Mapping[str, Any]) -> bool:
        """Whether reordering tokens outside the block stack is safe for this call."""

    @abstractmethod
    def processor(self, original: Any) -> SparseProcessor:
        """Our processor in place of ``original``."""

    @abstractmethod
    def order_hooks(self, model: Any, order: TokenOrder) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Registers the hooks that reorder tokens once per forward pass."""


def patch_transformer(family: Family, model: nn.Module, name: str, session: Session) -> None:
    """Patches one transformer; every change is registered for undo as soon as it is made.

    Raises:
        StrictError: in a strict session, if a layer's processor is not one the family knows.
    """
    state = TransformerState(name)
    context: list[tuple[str, int | None]] = []
    _watch_cache_context(model, context, session)

    # type(model): offloading replaces the instance's forward by a wrapper without the names
    parameters = inspect.signature(type(model).forward)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = parameters.bind_partial(module, *args, **kwargs).arguments
        branch, step = context[-1] if context else (None, None)
        moment = session.clock.tick(
            call["timestep"], context=branch, context_step=step, separate_guidance=family.separate_guidance
        )
        grid: VideoGrid | str
        if getattr(model, "_parallel_config", None) is not None:
            grid = "the model runs under context parallelism, where a layer sees a part of the sequence"
        else:
            grid = family.grid(model, call)
        session.enter(state, moment, grid, tiled=family.tiles_once(model, call))

    session.on_close(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
    if not session.plan.is_dense:  # a dense plan touches no token, so its output is bit-identical
        for handle in family.order_hooks(model, TokenOrder(state)):
            session.on_close(handle.remove)

    for layer, (module_name, module) in enumerate(family.attention_layers(model)):
        original = module.processor
        if type(original).__name__ not in family.processors:
            reason = (
                f"its processor is a {type(original).__name__}, and for {family.name} only"
                f" {', '.join(family.processors)} can be replaced"
            )
            if session.strict:
                raise StrictError(f"{name}.{module_name} cannot be patched: {reason}; reset its processor first")
            session.not_patched.append({"module": f"{name}.{module_name}", "reason": reason})
            continue
        ours = family.processor(original)
        ours.handle = handle_for(session.add_site(state, layer, module_name, ours.dense))
        module.processor = ours
        session.on_close(_restorer(ours, module))
    session.not_patched += [
        {"module": f"{name}.{entry['module']}", "reason": entry["reason"]} for entry in family.left_alone(model)
    ]


def _restorer(processor: SparseProcessor, module: Any) -> Callable[[], None]:
    return lambda: processor.restore(module)


def _watch_cache_context(model: nn.Module, context: list[tuple[str, int | None]], session: Session) -> None:
    """Notes the names given to ``model.cache_context``, the only place where a pipeline tells cond from uncond."""
    original: Callable[..., AbstractContextManager[Any]] | None = getattr(model, "cache_context", None)
    if original is None:
        return

    @contextmanager
    def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
        context.append((name, kwargs.get("step_index")))
        try:
            with original(name, **kwargs):
                yield
        finally:
            context.pop()

    before = model.__dict__.get("cache_context")
    model.__dict__["cache_context"] = cache_context

    def undo() -> None:
        if before is None:
            model.__dict__.pop("cache_context", None)
        else:
            model.__dict__["cache_context"] = before

    session.on_close(undo)
