"""Trained parts of systems, from what the user gives to the layer that uses them.

The tensors hang on the attention modules as buffers that no state dict holds, so that whatever moves a module to a
device (``pipe.to``, CPU offloading) moves them along. A gate also takes the layer's input, which the processor hands
on. Both are undone when the session closes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ..compensation import build_compensation
from ..configs.plan import TRANSFORMERS, HeadPolicy, Plan
from ..configs.weights import GROUPS, TENSORS, WeightSource, by_layer, check_layer, read_weights
from ..engine.attachment import Attachment
from ..engine.session import Session
from ..engine.site import AttentionSite
from ..errors import ConfigError, VidaccelWarning
from ..patterns.registry import build_pattern
from .base import Family

__all__ = ["Trained", "Weights", "attach", "attached", "load_trained"]

#: One source for a pipeline with one transformer, or one for each by its name in the pipeline.
Weights: TypeAlias = "WeightSource | Mapping[str, WeightSource]"
#: Tensors by transformer and layer, by short name.
Trained: TypeAlias = "dict[str, dict[int, dict[str, torch.Tensor]]]"
#: Groups that a head's policy takes: (group, name of the rule, whether it does without).
_Takes: TypeAlias = "dict[HeadPolicy, list[tuple[str, str, bool]]]"

_GROUP_OF = {tensor.name: tensor.group for tensor in TENSORS}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32 = {tensor.name for tensor in TENSORS if tensor.float32}


def load_trained(
    plan: Plan, models: Sequence[tuple[str, nn.Module, Family]], weights: Weights | None
) -> tuple[Trained, list[str]]:
    """The tensors that the plan uses, read and checked, and notes for the report.

    Args:
        models: (name, transformer, family) of what is patched.
        weights: what the user gave.

    Raises:
        ConfigError: if the plan needs trained tensors that are not there, if what is there is not used, cannot be read,
            is for another model, or has the wrong shape.
    """
    takes = _takes(plan)
    if weights is None and not any(takes.values()):
        return {}, []
    sources = _sources(weights, [name for name, _, _ in models])
    trained: Trained = {}
    notes: dict[str, None] = {}
    given: set[str] = set()
    used: set[str] = set()
    for name, model, family in models:
        layers = list(family.attention_layers(model))
        found = {}
        if name in sources:
            found = by_layer(read_weights(sources[name]), [module for module, _ in layers])
        here = {_GROUP_OF[tensor] for tensors in found.values() for tensor in tensors}
        given |= here
        trained[name] = {}
        for number, (path, module) in enumerate(layers):
            wanted = _wanted(plan, takes, name, number)
            has = found.get(number, {})
            for group, (rule, neutral) in wanted.items():
                if any(_GROUP_OF[tensor] == group for tensor in has):
                    continue
                if neutral and group not in here:
                    notes.setdefault(
                        f"{rule} has no {GROUPS[group]} in {name}, so it adds nothing to the kept blocks; give trained"
                        " weights as vidaccel.patch(pipe, plan, weights=...)"
                    )
                    continue
                raise ConfigError(
                    f"plan {plan.name!r} runs {rule}, which needs {GROUPS[group]}, and there are none for"
                    f" {name}.{path}; give trained weights as vidaccel.patch(pipe, plan, weights=...)"
                )
            mine = {tensor: value for tensor, value in has.items() if _GROUP_OF[tensor] in wanted}
            used |= {_GROUP_OF[tensor] for tensor in mine}
            if mine:
                trained[name][number] = check_layer(mine, f"{name}.{path}", **_widths(family, module, path))
    if sources and not used:
        raise ConfigError(
            f"plan {plan.name!r} uses no trained tensors of the weights given, which hold"
            f" {_listed(given)}; leave out weights, or choose a plan such as vsa, sla or seer"
        )
    if given - used:
        message = f"the weights also hold {_listed(given - used)}, which plan {plan.name!r} does not use"
        warnings.warn(message, VidaccelWarning, stacklevel=3)
        notes.setdefault(message)
    return trained, list(notes)


def attach(attachment: Attachment, sites: Sequence[AttentionSite], trained: Trained) -> None:
    """Gives the patched layers of a transformer their tensors, and rules that ask for it the layer's input."""
    takers = _take_hidden(attachment.session.plan)
    modules = {path: (module, ours) for path, module, ours in attachment.processors}
    for site in sites:
        tensors = trained.get(site.transformer.name, {}).get(site.layer)
        if not tensors:
            continue
        module, processor = modules[site.stats.module]
        own = next((p for p in module.parameters() if p.dtype in _DTYPES), None)
        for name, tensor in tensors.items():
            # sequential offloading leaves parameters without data; then ours wait where they were read
            device = None if own is None or own.is_meta else own.device
            dtype = torch.float32 if name in _FLOAT32 or own is None else own.dtype
            attachment.add_buffer(module, _buffer(name), tensor.to(device=device, dtype=dtype))
        # not kept alive by the session, which outlives a transformer that is replaced
        site.weights = partial(_on_device, weakref.ref(module), tuple(tensors))
        processor.gated = any(_GROUP_OF[name] in takers for name in tensors)


def attached(session: Session, model: nn.Module, name: str) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors that the patched layers of a transformer have, by layer and name."""
    found = {}
    for site in session.sites:
        if site.transformer.name == name:
            buffers = dict(model.get_submodule(site.stats.module).named_buffers(recurse=False))
            names = (tensor.name for tensor in TENSORS if _buffer(tensor.name) in buffers)
            found[site.layer] = {tensor: buffers[_buffer(tensor)] for tensor in names}
    return found


def _take_hidden(plan: Plan) -> set[str]:
    """Groups of trained tensors whose rules take the layer's input beside them."""
    rules = {head.compensation for rule in plan.rules for head in rule.policy.heads}
    built = (build_compensation(rule) for rule in rules)
    return {group for rule in built if rule.needs_hidden for group in rule.trained}


def _on_device(module: weakref.ref[nn.Module], names: tuple[str, ...], device: torch.device) -> dict[str, torch.Tensor]:
    layer = module()
    assert layer is not None  # it makes the call
    return {name: getattr(layer, _buffer(name)).to(device) for name in names}


def _buffer(name: str) -> str:
    return f"_vidaccel_{name.replace('.', '_')}"


def _sources(weights: Weights | None, names: Sequence[str]) -> dict[str, WeightSource]:
    """What the user gave, by transformer."""
    if weights is None:
        return {}
    if isinstance(weights, Mapping) and weights and set(weights) <= set(TRANSFORMERS):
        for name in weights:
            if name not in names:
                raise ConfigError(f"there are weights for {name}, and the pipeline has {', '.join(names) or 'none'}")
        return dict(weights)  # type: ignore[arg-type]
    if len(names) != 1:
        raise ConfigError(
            f"the pipeline has {', '.join(names) or 'no transformer that runs sparse'}; give the weights of each one as"
            ' {"transformer": ..., "transformer_2": ...}'
        )
    return {names[0]: weights}  # type: ignore[dict-item]


def _takes(plan: Plan) -> _Takes:
    """What each of the plan's policies takes of trained tensors."""
    takes: _Takes = {}
    for head in dict.fromkeys(head for rule in plan.rules for head in rule.policy.heads):
        pattern, compensation = build_pattern(head.pattern), build_compensation(head.compensation)
        takes[head] = [(group, pattern.name, False) for group in pattern.trained]
        takes[head] += [(group, compensation.name, compensation.neutral) for group in compensation.trained]
    return takes


def _wanted(plan: Plan, takes: _Takes, transformer: str, layer: int) -> dict[str, tuple[str, bool]]:
    """Groups of tensors that a layer's rules take: (the first of these rules, whether all of them do without)."""
    wanted: dict[str, tuple[str, bool]] = {}
    for rule in plan.rules:
        if rule.transformer not in (None, transformer) or (rule.layers is not None and layer not in rule.layers):
            continue
        for head in dict.fromkeys(rule.policy.heads):
            for group, name, neutral in takes[head]:
                first, alike = wanted.get(group, (name, True))
                wanted[group] = first, alike and neutral
        if rule.noise == (0.0, 1.0) and rule.branch is None:
            break  # no later rule is asked for this layer
    return wanted


def _widths(family: Family, module: Any, path: str) -> dict[str, int]:
    """Heads, channels of a head and channels of the hidden states of an attention module."""
    projection: Any = getattr(module, "to_q", None)
    if not hasattr(projection, "in_features"):  # quantised layers are no nn.Linear, but say their size too
        raise ConfigError(f"{path} has no linear to_q to tell its size by, so trained weights cannot be checked for it")
    heads = family.heads_of(module)
    return {"heads": heads, "dim": projection.out_features // heads, "channels": projection.in_features}


def _listed(groups: set[str]) -> str:
    return ", ".join(GROUPS[group] for group in sorted(groups)) or "none"
