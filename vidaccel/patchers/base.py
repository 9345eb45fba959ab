"""What every family shares: entering a forward pass, reordering tokens once, swapping processors, and undoing it all.

Only nn hooks are used. diffusers' own hooks do not survive ``enable_model_cpu_offload``, and class-wide patches would
leak into other pipelines.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ..engine.ops import Entrance, handle_for, reorder
from ..engine.parallel import Ranks, ranks_of
from ..engine.prepare import needs_curvature
from ..engine.session import Session, TransformerState
from ..errors import PatchError, StrictError, VidaccelWarning
from ..types import VideoGrid
from .redirect import SparseProcessor, redirected

__all__ = ["AUDIO", "PROMPT", "REFINER", "Family", "TokenOrder", "grid_of", "patch_transformer"]


#: Reasons that many families share.
PROMPT = "cross-attention to the prompt"
REFINER = "attention among prompt tokens"
AUDIO = "the audio stream"


def grid_of(latents: torch.Tensor, patch: Sequence[int]) -> VideoGrid | str:
    """Token grid of latents [B, C, T, H, W] cut into patches, or one sentence on why they have none."""
    if latents.dim() != 5:
        return f"hidden_states has {latents.dim()} axes instead of 5"
    return VideoGrid(*(size // edge for size, edge in zip(latents.shape[2:], patch, strict=True)))


class TokenOrder:
    """Hooks that put tokens in layout order where they enter the block stack, and back where they leave it.

    They sit outside the stack, because caches skip blocks and model parallelism cuts between them.
    """

    def __init__(self, entrance: Entrance) -> None:
        self._entrance = entrance

    @property
    def _works(self) -> bool:
        """Whether to reorder; a compiled graph holds an operator that knows it when it runs."""
        return torch.compiler.is_compiling() or self._entrance.state.tiled

    def _tile(self, x: torch.Tensor, dim: int, *, back: bool = False) -> torch.Tensor:
        entrance = self._entrance
        if torch.compiler.is_compiling():
            return reorder(x, entrance.handle, entrance.token, dim, back)
        layout = entrance.state.layout(x.device)
        return layout.untile(x, dim) if back else layout.tile(x, dim)

    def tile_volume(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of a patch embedding with output [B, C, T, H, W], which the model flattens next."""
        return self._tile(out.flatten(2), 2).unflatten(2, out.shape[2:]) if self._works else None

    def tile_tokens(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of a patch embedding with output [B, S, C]."""
        return self._tile(out, 1) if self._works else None

    def tile_tables(self, module: nn.Module, args: Any, out: tuple[torch.Tensor, ...]) -> Any:
        """Forward hook of a RoPE module with tables [S, D] or [1, S, 1, D]."""
        return tuple(self._tile(table, 0 if table.dim() == 2 else 1) for table in out) if self._works else None

    def untile_tokens(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Forward pre-hook of the final norm, which takes [B, S, C]."""
        if not self._works:
            return None
        x, *rest = args
        return (self._tile(x, 1, back=True), *rest)


class Family(ABC):
    """One kind of video transformer. A subclass says what is special; :func:`patch_transformer` does the rest.

    Attributes:
        name: short name for tables.
        transformers: class names of the transformers, as diffusers spells them. Matched by name, because copies of a
            class in other modules are not subclasses.
        pipelines: class names of the pipelines that use them.
        layers: where the video self-attention sits, as ``stack.*.path`` with a list of blocks for the star.
        processors: class names of the attention processors we know how to replace.
        forget: local variables of those processors that build a mask, see :func:`~.redirect.redirected`.
        token_order: where the video tokens sit in the sequence.
        joint: whether other tokens share the video's self-attention. They attend everything and are always attended.
        dense: attention that is never touched: (module, why).
        dense_pipelines: those of ``pipelines`` that stay dense: (class name, why).
        separate_guidance: whether the unconditional pass is a second forward pass (and not half of the batch).

    Models are typed ``Any``, because the attributes that make a transformer are diffusers' own and untyped.
    """

    name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]
    pipelines: ClassVar[tuple[str, ...]]
    layers: ClassVar[tuple[str, ...]]
    processors: ClassVar[tuple[str, ...]]
    forget: ClassVar[frozenset[str]] = frozenset()
    token_order: ClassVar[str] = "video only"
    joint: ClassVar[bool] = False
    dense: ClassVar[tuple[tuple[str, str], ...]] = ()
    dense_pipelines: ClassVar[tuple[tuple[str, str], ...]] = ()
    separate_guidance: ClassVar[bool]

    def matches(self, model: object) -> bool:
        """Whether ``model`` is a transformer of this family, or a subclass of one."""
        return any(cls.__name__ in self.transformers for cls in type(model).__mro__)

    def attention_layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """(qualified name, module) of each video self-attention, in layer order."""
        for pattern in self.layers:
            stack, _, path = pattern.partition(".*.")
            for index, block in enumerate(getattr(model, stack, ())):
                yield f"{stack}.{index}.{path}", block.get_submodule(path)

    def left_alone(self, model: Any) -> Iterator[dict[str, str]]:
        """Attention that is dense by design, as {"module", "reason"} for the report."""
        for module, reason in self.dense:
            part = getattr(model, module.split(".")[0], None)
            empty = part is None or (isinstance(part, nn.ModuleList) and not len(part))
            if module.startswith("*") or not empty:
                yield {"module": module, "reason": f"{reason}, dense by design"}

    def heads_of(self, module: Any) -> int:
        """Heads of one of those modules."""
        return int(getattr(module, "heads", None) or module.num_heads)

    @abstractmethod
    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        """Token grid of a forward call given its arguments by name, or one sentence on why it cannot be known."""

    def before(self, model: Any, call: Mapping[str, Any]) -> int | None:
        """How many tokens that are not video precede it in the layers' sequence; ``None`` for all of them."""
        return 0

    def timestep(self, call: Mapping[str, Any], scheduler: Any) -> torch.Tensor | float:
        """The call's noise level on a scale from 0 to the schedule's length.

        Raises:
            PatchError: if the model is called without an argument of that name.
        """
        if "timestep" not in call:
            raise PatchError(
                f"a model of the family {self.name!r} was called without `timestep` (it got {', '.join(call)});"
                " override Family.timestep to say where its noise level is"
            )
        return call["timestep"]  # type: ignore[no-any-return]

    def tiles_once(self, model: Any, call: Mapping[str, Any]) -> bool:
        """Whether reordering tokens outside the block stack is safe for this call. Else every layer reorders."""
        return False

    def processor(self, original: Any) -> SparseProcessor:
        """Our processor in place of ``original``.

        Raises:
            PatchError: if its attention call cannot be redirected.
        """
        return redirected(type(original), self.forget)(original)  # type: ignore[arg-type]

    def order_hooks(self, model: Any, order: TokenOrder) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Registers the hooks that reorder tokens once per forward pass."""
        yield from ()


def patch_transformer(family: Family, model: nn.Module, name: str, session: Session) -> None:
    """Patches one transformer; every change is registered for undo as soon as it is made.

    Raises:
        PatchError: if the model has no module where the family says that the attention is.
        StrictError: in a strict session, if a layer's processor is not one the family knows.
    """
    layers = _layers(family, model, name)
    state = TransformerState(name, joint=family.joint)
    entrance = Entrance(session, state, separate_guidance=family.separate_guidance)
    entrance.ranks = partial(_ranks, model)
    _watch_cache_context(model, entrance.context, session)

    # of the class: offloading replaces the instance's forward by a wrapper without the names
    _, *names = inspect.signature(type(model).forward).parameters

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        level = family.timestep(call, session.clock.scheduler)
        entrance.enter(level, family.grid(model, call), family.tiles_once(model, call), family.before(model, call))

    session.on_close(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
    watches, reorders = needs_curvature(session.plan), not session.plan.is_dense
    entrance.hooks = f"{watches=}, {reorders=}"
    if watches:

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            entrance.leave(output if isinstance(output, torch.Tensor) else output[0])

        session.on_close(model.register_forward_hook(leave).remove)
    if reorders:  # a dense plan touches no token, so its output is bit-identical
        for handle in family.order_hooks(model, TokenOrder(entrance)):
            session.on_close(handle.remove)

    skipped: list[dict[str, str]] = []
    for layer, (module_name, module) in enumerate(layers):
        try:
            ours = _replacement(family, module.processor)
        except PatchError as error:
            if session.strict:
                raise StrictError(
                    f"{name}.{module_name} cannot be patched: {error}; reset its processor first"
                ) from None
            skipped.append({"module": f"{name}.{module_name}", "reason": str(error)})
            continue
        site = session.add_site(state, layer, module_name, ours.dense)
        site.dense_alone = ours.dense_alone
        ours.handle = handle_for(site)
        ours.entrance = entrance
        module.processor = ours
        session.on_close(_restorer(ours, module))
    if len(skipped) == len(layers):
        warnings.warn(
            f"none of the {len(layers)} attention layers of {name} was patched, all run dense: {skipped[0]['module']}:"
            f" {skipped[0]['reason']}",
            VidaccelWarning,
            stacklevel=3,
        )
    session.not_patched += skipped
    session.not_patched += [
        {"module": f"{name}.{entry['module']}", "reason": entry["reason"]} for entry in family.left_alone(model)
    ]


def _ranks(model: Any) -> Ranks | str | None:
    """The processes that share the model's sequence now: diffusers may be told before or after patching."""
    parallel = getattr(model, "_parallel_config", None)
    return None if parallel is None else ranks_of(parallel)


def _layers(family: Family, model: nn.Module, name: str) -> list[tuple[str, Any]]:
    try:
        layers, missing = list(family.attention_layers(model)), ""
    except AttributeError as error:  # of get_submodule: a stack without that path
        layers, missing = [], f" ({error})"
    if not layers:
        raise PatchError(
            f"{name} ({type(model).__name__}) has no attention at {', '.join(family.layers)}{missing}; correct `layers`"
            f" of the family {family.name!r}"
        )
    return layers


def _replacement(family: Family, original: Any) -> SparseProcessor:
    if type(original).__name__ not in family.processors:
        raise PatchError(
            f"its processor is a {type(original).__name__}, and for {family.name} only"
            f" {', '.join(family.processors)} can be replaced"
        )
    return family.processor(original)


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
