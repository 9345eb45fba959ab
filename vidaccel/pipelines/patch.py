"""The one line: ``session = vidaccel.patch(pipe)``, and its exact undo."""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

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
from ..patchers.base import Family, patch_transformer
from ..patchers.dense_only import DENSE_ONLY, DenseOnly
from ..patchers.fingerprint import fingerprint_of
from ..patchers.registry import dense_only_of, families, family_of
from ..patchers.trained import Weights, attach, load_trained
from .running import check_idle

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
) -> Session:
    """Makes the video self-attention of a pipeline run by a plan.

    Nothing but the attention processors is replaced; ``unpatch`` puts the very same objects back. A model that is known
    to have nothing to gain is left as it is, with a warning and the reason in the report.

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

    Raises:
        AlreadyPatchedError: if the pipeline is patched.
        UnsupportedModelError: if it holds no video transformer that vidaccel knows.
        PlanMismatchError: if the plan was made for another model or scheduler.
        ConfigError: if the plan or the kernel's name is not valid, or the weights are missing or do not fit.
        PatchError: if a transformer has no attention where its family says, or the pipeline is running.
        StrictError: in strict mode, if a layer's processor cannot be replaced, or the pipeline holds only models that
            stay dense.
    """
    resolved = resolve_plan(plan)
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
        for name, model, kind in everything:
            session.on_close(partial(model.__dict__.pop, _SESSION, None))
            model.__dict__[_SESSION] = session
            if isinstance(kind, Family):
                patch_transformer(kind, model, name, session)
                attach(session, model, [site for site in session.sites if site.state.name == name], trained)
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


def _leave_dense(kind: DenseOnly, model: nn.Module, name: str, session: Session, *, refuse: bool) -> None:
    message = f"{name} ({type(model).__name__}) stays dense: {kind.reason}"
    if refuse:
        raise StrictError(f"{message}; patch with strict=False to have that reported instead")
    session.not_patched.append({"module": name, "reason": kind.reason})
    session.say_once(message)
    warnings.warn(message, VidaccelWarning, stacklevel=3)


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
