"""Swap the weights of Linears for torchao's 8-bit ones, and put the very same Parameters back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..configs.linear import LinearPlan
from ..errors import ConfigError, KernelError, PatchError, StrictError
from .places import LinearPlace, linear_places
from .support import config_of, why_no_torchao, why_not, why_not_linear

__all__ = ["check_linear", "quantise", "quantise_one", "swap_weight"]

#: ``on_close(undo)`` registers one step back.
OnClose = Callable[[Callable[[], Any]], None]


def check_linear(plan: LinearPlan, device: torch.device) -> None:
    """Raises unless every precision of the plan can run there, before anything is changed.

    Args:
        device: where the model computes.

    Raises:
        ConfigError: if torchao is missing or too old.
        KernelError: if the device cannot compute a precision.
    """
    missing = why_no_torchao() if plan.precisions else None
    if missing is not None:
        raise ConfigError(f"linear={plan} needs torchao: {missing}")
    for precision in plan.precisions:
        reason = why_not(precision, device)
        if reason is not None:
            raise KernelError(f"{reason}; leave linear={precision} out, or see vidaccel doctor for what runs here")


def quantise(
    model: nn.Module,
    name: str,
    stacks: Sequence[str],
    plan: LinearPlan,
    device: torch.device,
    on_close: OnClose,
    *,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """Quantises one transformer's Linears by the plan.

    Original weights stay where they are on a CPU. Those on another device are moved to the CPU until the undo, so that
    memory there goes down by what 8 bits save.

    Args:
        name: the pipeline's name for the transformer.
        stacks: paths of its lists of blocks.
        device: where it computes.
        strict: raise where a Linear that the plan names cannot be taken.

    Returns:
        For the report, one entry for each precision or reason: ``transformer``, ``module``, ``layers``, and either
        ``precision`` or ``reason``.

    Raises:
        ConfigError: if the plan names Linears that are not there, or none can be quantised.
        PatchError: if the transformer's weights are under group offloading.
        StrictError: see ``strict``.
        KernelError: if torchao refuses a weight.
    """
    _check_offloading(model, name)
    places = linear_places(model, stacks)
    _check_names(plan, name, places)
    rows: dict[tuple[str, str, str], list[int]] = {}
    done: set[int] = set()
    for place in places:
        precision = plan.lookup(name, place.module, place.layer)
        if precision == "native":
            continue
        reason = place.kept or why_not_linear(place.linear, precision, device)
        if reason is None:
            quantise_one(place.linear, precision, f"{name}.{place.module}", on_close)
            done.add(id(place.linear))
        elif strict and place.kept is None:
            raise StrictError(
                f"{name}.{place.module} in layer {place.layer} cannot be {precision}: {reason}; patch with strict=False"
                " to have that reported instead"
            )
        kind = ("precision", precision) if reason is None else ("reason", reason)
        rows.setdefault((place.module, *kind), []).append(place.layer)
    _refuse_merging(model, done, on_close)
    found = [
        {"transformer": name, "module": module, "layers": layers, kind: told}
        for (module, kind, told), layers in rows.items()
    ]
    if rows and not done:
        reasons = Counter(row["reason"] for row in found if "reason" in row)
        raise ConfigError(
            f"no Linear of {name} can be quantised as linear={plan} asks: {reasons.most_common(1)[0][0]}; leave it out"
        )
    return found


def quantise_one(linear: nn.Linear, precision: str, name: str, on_close: OnClose) -> None:
    """Swaps one weight, and moves the original to the CPU if it lies elsewhere.

    Raises:
        KernelError: if torchao refuses it.
    """
    original, bias = linear.weight, None if linear.bias is None else linear.bias.dtype
    on_close(partial(_restore, linear, original, bias, "extra_repr" in linear.__dict__))
    swap_weight(linear, precision, name)
    if original.device.type not in ("cpu", "meta"):
        original.data = original.data.to("cpu")


def swap_weight(linear: nn.Linear, precision: str, name: str) -> None:
    """The same for good: there is no undo.

    Raises:
        KernelError: if torchao refuses it.
    """
    from torchao.quantization import quantize_

    original = linear.weight
    try:
        with torch.no_grad():
            quantize_(linear, config_of(precision), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise KernelError(f"torchao cannot make {name} {precision}: {line}; leave it out of linear") from error
    if linear.weight is original:
        sizes = "x".join(map(str, original.shape))
        raise KernelError(f"torchao left {name} ({sizes}, {original.dtype}) as it was; leave it out of linear")


def _restore(linear: nn.Linear, original: torch.Tensor, bias: torch.dtype | None, had_text: bool) -> None:
    device = linear.weight.device
    # the model may have been moved or cast while the weight was away
    cast = original.dtype if bias is None or linear.bias.dtype == bias else linear.bias.dtype
    if device.type != "meta" and (original.device != device or original.dtype != cast):
        original.data = original.data.to(device=device, dtype=cast)
    linear.weight = original  # type: ignore[assignment]
    if not had_text:
        linear.__dict__.pop("extra_repr", None)  # torchao's


def _check_offloading(model: nn.Module, name: str) -> None:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = {hook for registry in registries if registry is not None for hook in registry.hooks}
    if any("group_offloading" in hook for hook in hooks):
        raise PatchError(
            f"{name} is under group offloading, which keeps its own copies of the weights; use model offloading"
            " (enable_model_cpu_offload) with linear, or leave linear out"
        )


def _check_names(plan: LinearPlan, name: str, places: Sequence[LinearPlace]) -> None:
    known: dict[str, int] = {}
    for place in places:
        known[place.module] = max(known.get(place.module, 0), place.layer)
    for rule in plan.rules:
        if rule.transformer not in (None, name):
            continue
        missing = [module for module in rule.modules or () if module not in known]
        if missing:
            raise ConfigError(f"linear names {missing[0]}, which {name} lacks; it has {', '.join(known) or 'none'}")
        last = max((known[module] for module in rule.modules or known), default=-1)
        if rule.layers is not None and rule.layers[-1] > last:
            raise ConfigError(f"linear names layer {rule.layers[-1]}, and the last one of {name} there is {last}")


def _refuse_merging(model: nn.Module, done: set[int], on_close: OnClose) -> None:
    """Keeps LoRA from being fused into, or taken out of, weights that are 8 bits for now."""
    for path, module in model.named_modules():
        if id(getattr(module, "base_layer", None)) not in done:
            continue

        def refuse(*args: Any, path: str = path, **kwargs: Any) -> None:
            raise PatchError(
                f"the LoRA of {path} cannot be fused or unfused while its Linear is quantised; call"
                " vidaccel.unpatch(pipe) first"
            )

        for method in ("merge", "unmerge"):
            if method not in module.__dict__:
                module.__dict__[method] = refuse
                on_close(partial(module.__dict__.pop, method, None))
