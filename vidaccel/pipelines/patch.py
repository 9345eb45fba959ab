"""The one line: ``session = vidaccel.patch(pipe)``, and its exact undo."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..configs.linear import LinearPlan, linear_plan
from ..configs.plan import Plan
from ..configs.presets import resolve_plan
from ..engine.clock import Clock
from ..engine.guard import Guard
from ..engine.prepare import check_plan
from ..engine.session import Session
from ..errors import (
    AlreadyPatchedError,
    ConfigError,
    NotPatchedError,
    PlanMismatchError,
    StrictError,
    UnsupportedModelError,
    VidaccelWarning,
)
from ..kernels.dispatch import kernels
from ..linear.places import stacks_of
from ..linear.quantise import check_linear, quantise
from ..patchers.base import Family, patch_transformer
from ..patchers.dense_only import DENSE_ONLY, DenseOnly
from ..patchers.fingerprint import fingerprint_of
from ..patchers.registry import dense_only_of, families, family_of
from ..patchers.trained import Weights, attach, load_trained
from .caches import enabled, read_cache
from .running import check_idle, uncompiled

__all__ = ["DEFAULT_PLAN", "find_transformers", "patch", "session_of", "unpatch"]

#: The preset of ``patch(pipe)`` without a plan.
DEFAULT_PLAN = "sta"

# The session hangs on the transformer itself: a table here would keep every patched model alive for ever.
_SESSION = "_vidaccel_session"


def patch(
    pipe: Any,
    plan: str | Path | Plan = DEFAULT_PLAN,
    *,
    strict: bool = False,
    allow_mismatch: bool = False,
    kernel: str | None = None,
    weights: Weights | None = None,
    guard: Guard | None = None,
    linear: str | LinearPlan | None = None,
) -> Session:
    """Makes the video self-attention of a pipeline run by a plan.

    Nothing but the attention processors is replaced, and the weights of Linears that the plan wants in 8 bits;
    ``unpatch`` puts the very same objects back. The plan's step cache, if it has one, is enabled, and disabled again by
    ``unpatch``. A model that is known to have nothing to gain is left as it is, with a warning and the reason in the
    report.

    Args:
        pipe: a diffusers pipeline, a ModularPipeline with its components loaded, or a bare transformer.
        plan: a preset's name, the path of a plan file (``.safetensors`` or ``.yaml``), or a :class:`Plan`.
        strict: raise :class:`StrictError` where a layer cannot run as planned, instead of running it dense and
            reporting it.
        allow_mismatch: warn, naming every difference, when the plan was made for another model or token grid,
            instead of raising.
        kernel: name of the kernel to use (see ``vidaccel doctor``), or ``None`` for the best one that can run.
        weights: trained parts of the plan's system (VSA's gates, SLA's projections, SeerAttention's gates): a
            ``.safetensors`` file, a folder of them or a state dict, of these parts alone or of a whole checkpoint; for
            a pipeline with two transformers one of these for each, by name.
        guard: compare some sparse calls with exact attention, and run heads that are too far off dense from then on:
            ``Guard(every=16)``. Without it only non-finite, huge and flat outputs are caught.
        linear: ``"int8"`` or ``"fp8"`` for every Linear of the blocks' attention and feed-forward, or a
            :class:`LinearPlan` that says which, computed by torchao; ``"none"`` for none of them. ``None`` does what
            the plan says.

    Raises:
        AlreadyPatchedError: if the pipeline is patched.
        UnsupportedModelError: if it holds no video transformer that vidaccel knows.
        PlanMismatchError: if the plan was made for another model or scheduler.
        ConfigError: if the plan or the kernel's name is not valid, or the weights are missing or do not fit, or a
            transformer does not support the plan's step cache or has one already, or torchao is missing, or no Linear
            can be quantised.
        KernelError: if this device cannot compute Linears as asked.
        PatchError: if a transformer has no attention where its family says, or the pipeline is running.
        StrictError: in strict mode, if a layer's processor cannot be replaced, or the pipeline holds only models that
            stay dense.
    """
    resolved = resolve_plan(plan)
    if linear is not None:
        resolved = replace(resolved, linear=linear_plan(linear))
    check_plan(resolved)
    known = [k.name for k in kernels()]
    if kernel is not None and kernel not in known:
        raise ConfigError(f"there is no kernel {kernel!r}; valid are {', '.join(known)}")
    everything = _find(pipe)
    check_idle(pipe, [model for _, model, _ in everything], "patch")
    for name, model, _ in everything:
        running = model.__dict__.get(_SESSION)
        if running is not None:
            raise AlreadyPatchedError(
                f"{name} is patched already with plan {running.plan.name!r}; call vidaccel.unpatch(pipe) first"
            )
    found = [(name, model, family) for name, model, family in everything if isinstance(family, Family)]
    for name, model, family in found:
        _check_fingerprint(resolved, name, model, family, getattr(pipe, "scheduler", None), allow_mismatch)

    device = _device(pipe, found)
    if resolved.linear is not None:
        if not found:
            raise ConfigError(f"{type(pipe).__name__} stays dense as a whole, and so do its Linears; leave linear out")
        check_linear(resolved.linear, device)
    trained, notes = load_trained(resolved, found, weights)
    owner = weakref.ref(pipe)
    session = Session(
        resolved,
        Clock(lambda: getattr(owner(), "scheduler", None)),
        strict=strict,
        allow_mismatch=allow_mismatch,
        kernel=kernel,
        guard=guard,
    )
    try:
        if resolved.cache is not None:
            _enable_cache(pipe, resolved.cache, session)
        for name, model, kind in everything:
            session.on_close(partial(model.__dict__.pop, _SESSION, None))
            model.__dict__[_SESSION] = session
            if isinstance(kind, Family):
                patch_transformer(kind, model, name, session)
                attach(session, model, [site for site in session.sites if site.state.name == name], trained)
                if resolved.linear is not None:
                    stacks, undo = stacks_of(kind.layers), session.on_close
                    session.linear += quantise(model, name, stacks, resolved.linear, device, undo, strict=strict)
            else:
                _leave_dense(kind, model, name, session, refuse=strict and not found)
    except BaseException:
        session.close()  # half a patch is never left behind
        raise
    for note in notes:
        session.say_once(note)
    return session


def unpatch(pipe: Any) -> None:
    """Undoes ``patch``: the same processor objects, no hooks, bit-identical output.

    Raises:
        NotPatchedError: if the pipeline is not patched.
        UnsupportedModelError: if it holds no video transformer at all.
        PatchError: if the pipeline is running.
    """
    session = session_of(pipe)
    if session is None:
        raise NotPatchedError("this pipeline is not patched; call vidaccel.patch(pipe) before vidaccel.unpatch(pipe)")
    check_idle(pipe, [model for _, model, _ in _find(pipe)], "unpatch")
    session.close()


def session_of(pipe: Any) -> Session | None:
    """The session of a patched pipeline, or ``None``."""
    sessions = (model.__dict__.get(_SESSION) for _, model, _ in _find(pipe))
    return next((session for session in sessions if session is not None), None)


def find_transformers(pipe: Any) -> list[tuple[str, nn.Module, Family]]:
    """(name, module, family) of every transformer in ``pipe`` that vidaccel can patch, ``transformer`` first.

    Raises:
        UnsupportedModelError: if there is no video model that vidaccel knows.
    """
    return [(name, model, family) for name, model, family in _find(pipe) if isinstance(family, Family)]


def _find(pipe: Any) -> list[tuple[str, nn.Module, Family | DenseOnly]]:
    """The same with the models that are known and stay dense."""
    parts = {"transformer": pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", None)
    if parts is None:
        raise UnsupportedModelError(
            f"vidaccel.patch takes a diffusers pipeline or a transformer, not a {type(pipe).__name__}"
        )
    found = []
    for name, part in sorted(parts.items()):
        part = uncompiled(part)
        kind = (family_of(part) or dense_only_of(part)) if isinstance(part, nn.Module) else None
        if kind is not None:
            found.append((name, part, kind))
    if not found:
        for known in DENSE_ONLY:  # an image model that only this pipeline turns into a video model
            if type(pipe).__name__ in known.pipelines:
                raise UnsupportedModelError(f"{type(pipe).__name__} stays dense: {known.reason}")
        names = ", ".join(cls for family in families() for cls in family.transformers)
        modules = ", ".join(type(part).__name__ for part in parts.values() if isinstance(part, nn.Module)) or "none"
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no video transformer that vidaccel knows (its modules: {modules});"
            f" known are {names}"
        )
    return found


def _device(pipe: Any, found: Sequence[tuple[str, nn.Module, Family]]) -> torch.device:
    """Where the transformers compute, which for an offloaded pipeline is not where their weights lie."""
    device = None if isinstance(pipe, nn.Module) else getattr(pipe, "_execution_device", None)
    if device is None:
        weights = (parameter for _, model, _ in found for parameter in model.parameters())
        device = next((weight.device for weight in weights if not weight.is_meta), torch.device("cpu"))
    return torch.device(device)


def _leave_dense(kind: DenseOnly, model: nn.Module, name: str, session: Session, *, refuse: bool) -> None:
    message = f"{name} ({type(model).__name__}) stays dense: {kind.reason}"
    if refuse:
        raise StrictError(f"{message}; patch with strict=False to have that reported instead")
    session.not_patched.append({"module": name, "reason": kind.reason})
    session.say_once(message)
    warnings.warn(message, VidaccelWarning, stacklevel=3)


def _enable_cache(pipe: Any, text: str, session: Session) -> None:
    stack = ExitStack()
    stack.enter_context(enabled(pipe, read_cache(text), None))
    session.on_close(stack.close)
    session.say_once(f"diffusers' step cache {text} is on, as the plan says")


def _check_fingerprint(
    plan: Plan, name: str, model: nn.Module, family: Family, scheduler: object | None, allow_mismatch: bool
) -> None:
    if plan.fingerprint is None:
        return
    differences = plan.fingerprint.differences(fingerprint_of(family, model, scheduler))
    if not differences:
        return
    message = (
        f"the plan {plan.name!r} does not fit {name}: {'; '.join(differences)};"
        " use a plan made for this model, or patch with allow_mismatch=True"
    )
    if not allow_mismatch:
        raise PlanMismatchError(message)
    warnings.warn(message, VidaccelWarning, stacklevel=3)
