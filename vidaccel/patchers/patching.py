"""Patches one transformer of a family: its processors, and the hooks that open and close a forward pass.

Only nn hooks are used. diffusers' own hooks do not survive ``enable_model_cpu_offload``, and class-wide patches would
leak into other pipelines.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..engine.attachment import Attachment, NotPickled
from ..engine.capture import refuse_tracing
from ..engine.context import PatchedTransformer
from ..engine.gate import ForwardGate
from ..engine.handles import SITES
from ..engine.parallel import Ranks, ranks_of
from ..engine.prepare import needs_curvature
from ..engine.session import Session
from ..errors import PatchError, StrictError, VidaccelWarning
from .base import Family
from .copies import watch_copies
from .order import TokenOrder
from .redirect import SparseProcessor

__all__ = ["patch_transformer"]


def patch_transformer(family: Family, model: nn.Module, name: str, session: Session) -> Attachment:
    """Patches one transformer; every change is registered for undo as soon as it is made.

    Args:
        name: the pipeline's name for it.

    Raises:
        PatchError: if the model has no module where the family says that the attention is.
        StrictError: in a strict session, if a layer's processor is not one the family knows.
    """
    layers = _layers(family, model, name)
    attachment = session.attach(model, name)
    transformer = PatchedTransformer(name, joint=family.joint, separate_guidance=family.separate_guidance)
    gate = ForwardGate(attachment, transformer)
    gate.ranks = _ranks
    _name_passes(model, gate, attachment)

    gate.notes_output, reorders = needs_curvature(session.plan), not session.plan.is_dense
    gate.hooks = f"watches={gate.notes_output}, {reorders=}"
    enter = partial(_enter, gate, family, model, _argument_names(model))
    attachment.add_hook(model.register_forward_pre_hook(enter, with_kwargs=True))
    attachment.add_hook(model.register_forward_hook(partial(_leave, gate), always_call=True))
    if reorders:  # a dense plan touches no token, so its output is bit-identical
        for handle in family.order_hooks(model, TokenOrder(gate)):
            attachment.add_hook(handle)

    skipped: list[dict[str, str]] = []
    for layer, (path, module) in enumerate(layers):
        try:
            ours = _replacement(family, module.processor)
        except PatchError as error:
            if session.strict:
                raise StrictError(f"{name}.{path} cannot be patched: {error}; reset its processor first") from None
            skipped.append({"module": f"{name}.{path}", "reason": str(error)})
            continue
        site = session.add_site(transformer, layer, path, ours.dense)
        site.dense_alone = ours.dense_alone
        ours.session, ours.handle, ours.gate = session, SITES.new(site), gate
        module.processor = ours
        attachment.processors.append((path, module, ours))
        attachment.on_close(partial(ours.restore, module))
    gate.all_ours = not skipped
    if len(skipped) == len(layers):
        warnings.warn(
            f"none of the {len(layers)} attention layers of {name} was patched, all run dense: {skipped[0]['module']}:"
            f" {skipped[0]['reason']}",
            VidaccelWarning,
            stacklevel=3,
        )
    watch_copies(attachment, partial(patch_transformer, family))
    session.not_patched += skipped
    session.not_patched += [
        {"module": f"{name}.{entry['module']}", "reason": entry["reason"]} for entry in family.left_alone(model)
    ]
    return attachment


def _enter(
    gate: ForwardGate,
    family: Family,
    model: nn.Module,
    names: Sequence[str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Forward pre-hook of a transformer."""
    refuse_tracing()  # before it is told that the sizes are tensors
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    level = family.timestep(call, gate.scheduler)
    gate.enter(level, family.grid(model, call), family.tiles_once(model, call), family.before(model, call))


def _leave(gate: ForwardGate, module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a transformer, called also if it failed."""
    gate.leave(output if output is None or isinstance(output, torch.Tensor) else output[0])


def _argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of ``forward``, by the first class that spells them out.

    Of the class: offloading replaces the instance's forward by a wrapper without the names, and so may a subclass.
    """
    for cls in type(model).__mro__:
        if "forward" in cls.__dict__:
            _, *parameters = inspect.signature(cls.__dict__["forward"]).parameters.values()
            if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
                return [parameter.name for parameter in parameters]
    return []


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
    if isinstance(original, SparseProcessor):
        if not original.is_closed:
            raise PatchError("its processor is of another transformer that is patched")
        original = original.original  # put back by the user after its session was closed
    if type(original).__name__ not in family.processors:
        raise PatchError(
            f"its processor is a {type(original).__name__}, and for {family.name} only"
            f" {', '.join(family.processors)} can be replaced"
        )
    return family.processor(original)


class _NamedPasses(NotPickled):
    """Stands in for ``model.cache_context``, and notes the names given to it."""

    def __init__(self, original: Callable[..., AbstractContextManager[Any]], gate: ForwardGate) -> None:
        self._original, self._gate = original, gate

    def __deepcopy__(self, memo: dict[int, Any]) -> _NamedPasses:
        return self  # a copy of the model drops it

    def __call__(self, name: str, **kwargs: Any) -> AbstractContextManager[Any]:
        if not self._gate.session.closed:
            self._gate.begin_cache()
        with ExitStack() as blocks:
            blocks.enter_context(self._gate.passes.block(name, kwargs.get("step_index")))
            blocks.enter_context(self._original(name, **kwargs))
            return blocks.pop_all()


def _name_passes(model: nn.Module, gate: ForwardGate, attachment: Attachment) -> None:
    original = getattr(model, "cache_context", None)
    if original is not None:
        attachment.set_attribute(model, "cache_context", _NamedPasses(original, gate))
