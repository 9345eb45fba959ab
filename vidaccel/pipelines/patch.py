"""The one line: ``session = vidaccel.patch(pipe)``, and its exact undo."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..configs.linear import LinearPlan, linear_plan
from ..configs.plan import Plan
from ..configs.presets import resolve_plan
from ..engine.attachment import Attachment, attachment_of
from ..engine.guard import Guard
from ..engine.pipeline_call import check_idle
from ..engine.prepare import check_plan
from ..engine.session import Session
from ..engine.unwrap import unwrapped
from ..errors import (
    AlreadyPatchedError,
    ConfigError,
    NotPatchedError,
    PatchError,
    PlanMismatchError,
    StrictError,
    UnsupportedModelError,
    VidaccelWarning,
)
from ..kernels.dispatch import kernels
from ..linear.places import stacks_of
from ..linear.quantise import check_linear, quantise
from ..patchers.base import Family
from ..patchers.copies import watch_copies
from ..patchers.dense_only import DENSE_ONLY, DenseOnly
from ..patchers.fingerprint import fingerprint_of
from ..patchers.patching import patch_transformer
from ..patchers.registry import dense_only_of, families, family_of
from ..patchers.trained import Weights, attach, load_trained
from ..types import TRANSFORMERS
from .caches import enable, read_cache
from .start_check import check_starts

__all__ = ["DEFAULT_PLAN", "find_transformers", "patch", "session_of", "unpatch"]

#: The preset of ``patch(pipe)`` without a plan.
DEFAULT_PLAN = "sta"

#: Attribute of a patched pipeline, beside that of its transformers: it may be given others.
_SESSION = "_vidaccel_session"


@dataclass(frozen=True, eq=False)
class _Found:
    """A transformer of a pipeline: its name there, the module inside what may be around it, and what is known of it."""

    name: str
    model: nn.Module
    kind: Family | DenseOnly


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
    transformer: str | None = None,
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
        transformer: for a bare transformer, which one of the pipeline it is: ``"transformer"`` or ``"transformer_2"``.
            It must be said if the plan has rules for ``transformer_2``.

    Raises:
        AlreadyPatchedError: if the pipeline is patched.
        UnsupportedModelError: if it holds no video transformer that vidaccel knows.
        PlanMismatchError: if the plan was made for another model or scheduler.
        ConfigError: if the plan or the kernel's name is not valid, or its rules name a transformer and it is not known
            which one this is, or the weights are missing or do not fit, or a
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
    everything = _find(pipe, transformer)
    check_idle(pipe, [part.model for part in everything], "patch")
    for running in _sessions(pipe, everything):
        raise AlreadyPatchedError(
            f"{type(pipe).__name__} is patched already with plan {running.plan.name!r}; call vidaccel.unpatch(pipe)"
            " first"
        )
    found = [(part.name, part.model, part.kind) for part in everything if isinstance(part.kind, Family)]
    unused = _check_names(resolved, pipe, [name for name, _, _ in found], transformer)
    for name, model, family in found:
        _check_fingerprint(resolved, name, model, family, getattr(pipe, "scheduler", None), allow_mismatch)

    device = _device(pipe, found)
    if resolved.linear is not None:
        if not found:
            raise ConfigError(f"{type(pipe).__name__} stays dense as a whole, and so do its Linears; leave linear out")
        check_linear(resolved.linear, device)
    trained, notes = load_trained(resolved, found, weights)
    session = Session(resolved, pipe, strict=strict, allow_mismatch=allow_mismatch, kernel=kernel, guard=guard)
    try:
        if resolved.cache is not None:
            _enable_cache(pipe, resolved.cache, session)
        for part in everything:
            if isinstance(part.kind, DenseOnly):
                _leave_dense(part.kind, part, session, refuse=strict and not found)
                continue
            attachment = patch_transformer(part.kind, part.model, part.name, session)
            attach(attachment, [site for site in session.sites if site.transformer.name == part.name], trained)
            if resolved.linear is not None:
                _quantise(attachment, part.kind, resolved.linear, device)
        if not isinstance(pipe, nn.Module):
            pipe.__dict__[_SESSION] = session
            session.on_close(_Forget(pipe))
            check_starts(pipe, session)
    except BaseException:
        session.close()  # half a patch is never left behind
        raise
    for note in (*unused, *notes):
        session.say_once(note)
    _prove(session, device, [model for _, model, _ in found])
    return session


def _prove(session: Session, device: torch.device, models: Sequence[nn.Module]) -> None:
    """Tests the kernels now where it is known what they get; otherwise the first attention call does."""
    if session.plan.tile is None:
        return
    for model in models:
        head_dim = getattr(getattr(model, "config", None), "attention_head_dim", None)
        dtype = getattr(model, "dtype", None)
        if isinstance(head_dim, int) and isinstance(dtype, torch.dtype):
            session.proofs.prove(session.plan, device, dtype, head_dim, session.plan.tile)


def unpatch(pipe: Any) -> None:
    """Undoes ``patch``: the same processor objects, no hooks, bit-identical output.

    Transformers that were patched apart from each other are all put back, and so is one that the pipeline had when it
    was patched and has no more.

    Raises:
        NotPatchedError: if the pipeline is not patched.
        UnsupportedModelError: if it holds no video transformer at all.
        PatchError: if the pipeline is running.
    """
    everything = _find(pipe)
    sessions = _sessions(pipe, everything)
    if not sessions:
        raise NotPatchedError("this pipeline is not patched; call vidaccel.patch(pipe) before vidaccel.unpatch(pipe)")
    check_idle(pipe, [part.model for part in everything], "unpatch")
    for session in sessions:
        session.close()


def session_of(pipe: Any) -> Session | None:
    """The session of a patched pipeline, or ``None``; the first of them where its transformers were patched apart."""
    return next(iter(_sessions(pipe, _find(pipe))), None)


def _sessions(pipe: Any, everything: Sequence[_Found]) -> list[Session]:
    """The open sessions of a pipeline and of its transformers, each once."""
    own = [] if isinstance(pipe, nn.Module) else [getattr(pipe, "__dict__", {}).get(_SESSION)]
    hanging = (attachment_of(part.model) for part in everything)
    own += [attachment.session for attachment in hanging if attachment is not None]
    return list(dict.fromkeys(session for session in own if session is not None and not session.closed))


def find_transformers(pipe: Any) -> list[tuple[str, nn.Module, Family]]:
    """(name, module, family) of every transformer in ``pipe`` that vidaccel can patch, ``transformer`` first.

    Raises:
        UnsupportedModelError: if there is no video model that vidaccel knows.
    """
    return [(part.name, part.model, part.kind) for part in _find(pipe) if isinstance(part.kind, Family)]


def _find(pipe: Any, transformer: str | None = None) -> list[_Found]:
    """The same with the models that are known and stay dense, each once, whatever names it has."""
    if isinstance(pipe, type):
        raise UnsupportedModelError(
            f"{pipe.__name__} is a class; make a pipeline of it first, as in {pipe.__name__}.from_pretrained(...)"
        )
    if transformer is not None and (not isinstance(pipe, nn.Module) or transformer not in TRANSFORMERS):
        raise ConfigError(
            f"transformer is {transformer!r}; it says which one a bare transformer is, {' or '.join(TRANSFORMERS)}, and"
            " a pipeline knows the names of its own"
        )
    name = transformer or TRANSFORMERS[0]
    parts = {name: pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", None)
    if parts is None:
        raise UnsupportedModelError(
            f"vidaccel.patch takes a diffusers pipeline or a transformer, not a {type(pipe).__name__}"
        )
    found: dict[int, _Found] = {}
    for name, part in sorted(parts.items()):
        model = unwrapped(part)
        kind = (family_of(model) or dense_only_of(model)) if isinstance(model, nn.Module) else None
        if kind is not None:
            found.setdefault(id(model), _Found(name, model, kind))
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
    return list(found.values())


def _check_names(plan: Plan, pipe: Any, names: Sequence[str], told: str | None) -> list[str]:
    """Notes on rules of the plan for transformers that the pipeline does not have.

    Raises:
        ConfigError: if it cannot be known which of the plan's transformers this is.
    """
    named = [name for name in TRANSFORMERS if any(rule.transformer == name for rule in plan.rules)]
    missing = [name for name in named if name not in names]
    if not missing or not names:
        return []
    if isinstance(pipe, nn.Module):
        if told is None and missing != [TRANSFORMERS[0]]:
            raise ConfigError(
                f"plan {plan.name!r} has rules for {' and '.join(named)}, and a bare transformer does not tell which of"
                f' them it is; pass transformer="{TRANSFORMERS[0]}" or "{missing[0]}", or patch the pipeline'
            )
        return []
    present = {id(unwrapped(getattr(pipe, name, None))): name for name in names}
    for name in missing:
        same = present.get(id(unwrapped(getattr(pipe, name, None))))
        if same is not None:
            raise ConfigError(
                f"plan {plan.name!r} has rules for {name}, and {name} of this pipeline is the same module as {same};"
                " give it a module of its own, or take those rules out"
            )
    return [f"the plan has rules for {name}, which this pipeline does not have" for name in missing]


def _device(pipe: Any, found: Sequence[tuple[str, nn.Module, Family]]) -> torch.device:
    """Where the transformers compute, which for an offloaded pipeline is not where their weights lie."""
    device = None if isinstance(pipe, nn.Module) else getattr(pipe, "_execution_device", None)
    if device is None:
        weights = (parameter for _, model, _ in found for parameter in model.parameters())
        device = next((weight.device for weight in weights if not weight.is_meta), torch.device("cpu"))
    return torch.device(device)


def _leave_dense(kind: DenseOnly, part: _Found, session: Session, *, refuse: bool) -> None:
    message = f"{part.name} ({type(part.model).__name__}) stays dense: {kind.reason}"
    if refuse:
        raise StrictError(f"{message}; patch with strict=False to have that reported instead")
    watch_copies(session.attach(part.model, part.name), lambda model, name, copied: copied.attach(model, name))
    session.not_patched.append({"module": part.name, "reason": kind.reason})
    session.say_once(message)
    warnings.warn(message, VidaccelWarning, stacklevel=3)


def _quantise(attachment: Attachment, family: Family, linear: LinearPlan, device: torch.device) -> None:
    session, model = attachment.session, attachment.model
    stacks = stacks_of(family.layers)
    session.linear += quantise(
        model, attachment.name, stacks, linear, device, attachment.on_close, strict=session.strict
    )
    attachment.not_copied = "quantized Linears, whose original weights wait for the undo"

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PatchError(
            f"{attachment.name} cannot be saved while its Linears are quantized: the file would hold 8-bit weights that"
            " no from_pretrained reads; call vidaccel.unpatch(pipe) first"
        )

    for method in ("save_pretrained", "push_to_hub"):
        attachment.set_attribute(model, method, refuse)


def _enable_cache(pipe: Any, text: str, session: Session) -> None:
    cache = read_cache(text)
    if cache is None:
        return
    for undo in enable(pipe, cache, None):
        session.on_close(undo)
    session.say_once(f"diffusers' step cache {text} is on, as the plan says")


class _Forget:
    """Undo of what hangs on the pipeline, which may be gone by then."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    def __call__(self) -> None:
        pipe = self._pipe()
        if pipe is not None:
            pipe.__dict__.pop(_SESSION, None)


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
