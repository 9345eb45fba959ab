"""How far each Linear's output moves when it is computed in 8 bits: measured while a dense generation runs.

Inputs are quantised token by token, so a sample of tokens tells the error without running the whole product again. A
weight cannot change from step to step, but inputs do, and so does the error: it is kept for each noise bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..configs.linear import LinearPlan, LinearRule
from ..errors import ConfigError
from .places import LinearPlace
from .quantise import swap_weight

__all__ = ["LinearErrors", "linear_error", "plan_within", "watch_linears"]

#: ``now()`` is the noise bin of the call that is going on, and ``None`` where nothing is to be looked at.
Now = Callable[[], "int | None"]


@dataclass(eq=False)
class LinearErrors:
    """What was seen of one Linear.

    Args:
        transformer, module, layer, kind: see :class:`.places.LinearPlace`.
        size: output and input channels.
        bias: whether it has one.
        dtype: of its weight.
        bins: noise bins.
        site: number of the attention layer in its block, counted over all stacks; ``None`` if the caller has none.
        rows: tokens of a call, batch included, in the mean.
        calls: calls in all generations that were watched.
        energy: by noise bin, squared exact outputs of the sampled tokens, added up.
        error: by precision and noise bin, squared differences of the same.
    """

    transformer: str
    module: str
    layer: int
    kind: str
    size: tuple[int, int]
    bias: bool
    dtype: torch.dtype
    bins: int
    site: int | None = None
    rows: float = 0.0
    calls: int = 0
    energy: list[float] = field(default_factory=list)
    error: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.energy = self.energy or [0.0] * self.bins

    def relative(self, precision: str, bin: int) -> float | None:
        """Relative L2 error in a noise bin; ``None`` where nothing was seen."""
        if precision not in self.error or self.energy[bin] <= 0:
            return None
        return math.sqrt(self.error[precision][bin] / self.energy[bin])

    def worst(self, precision: str) -> float | None:
        """The largest of :meth:`relative` over noise bins; ``None`` if nothing was seen."""
        known = [error for bin in range(self.bins) if (error := self.relative(precision, bin)) is not None]
        return max(known, default=None)

    def see(self, linear: nn.Linear, x: torch.Tensor, out: torch.Tensor, bin: int, precisions: Sequence[str]) -> None:
        """Takes in one call: its input [..., in], its exact output [..., out], on the tokens to look at."""
        energy, errors = linear_error(linear, x, out, precisions)
        self.energy[bin] += energy
        for precision, error in errors.items():
            self.error.setdefault(precision, [0.0] * self.bins)[bin] += error


def linear_error(
    linear: nn.Linear, x: torch.Tensor, out: torch.Tensor, precisions: Sequence[str]
) -> tuple[float, dict[str, float]]:
    """Squared norm of the exact output, and of the difference in each precision; the Linear is left as it is.

    Args:
        x: input [N, in].
        out: its exact output [N, out].

    Raises:
        KernelError: if torchao refuses the weight.
    """
    exact = out.double()
    errors = {}
    for precision in precisions:
        copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        copy.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        copy.bias = linear.bias
        swap_weight(copy, precision, "a Linear")
        errors[precision] = float((copy(x).double() - exact).square().sum())
    return float(exact.square().sum()), errors


@contextmanager
def watch_linears(
    places: Sequence[tuple[str, LinearPlace, Sequence[str]]],
    bins: int,
    now: Now,
    *,
    tokens: int = 64,
) -> Iterator[list[LinearErrors]]:
    """Forward hooks on these Linears while the block runs; what they see is added to the list that it gets.

    Args:
        places: each with the name of its transformer before it, and the precisions to compare behind it.
        bins: number of noise bins.
        tokens: how many to compare a call, evenly spread over batch and sequence.
    """
    with ExitStack() as undo:
        found = []
        for transformer, place, precisions in places:
            linear = place.linear
            size = linear.out_features, linear.in_features
            bias, dtype = linear.bias is not None, linear.weight.dtype
            errors = LinearErrors(transformer, place.module, place.layer, place.kind, size, bias, dtype, bins)
            found.append(errors)
            hook = partial(_look, errors, tuple(precisions), now, tokens)
            undo.callback(linear.register_forward_hook(hook).remove)
        yield found


def _look(
    errors: LinearErrors,
    precisions: tuple[str, ...],
    now: Now,
    tokens: int,
    linear: Any,
    args: tuple[torch.Tensor, ...],
    out: torch.Tensor,
) -> None:
    (x,) = args
    rows = x.numel() // x.shape[-1]
    errors.calls += 1
    errors.rows += (rows - errors.rows) / errors.calls
    bin = now()
    if bin is None or not rows:
        return
    count = min(tokens, rows)
    chosen = (torch.arange(count, device=x.device) * rows) // count
    with torch.no_grad():
        x, out = (each.detach().reshape(rows, -1)[chosen] for each in (x, out))
        errors.see(linear, x, out, bin, precisions)


def plan_within(found: Sequence[LinearErrors], precision: str, limit: float) -> LinearPlan:
    """The plan that quantises each Linear whose relative L2 error stays within ``limit``.

    The worst noise bin counts, because a limit should hold at every step. A calibrated choice weighs the bins instead.

    Args:
        found: see :func:`watch_linears`.
        limit: for example .01.

    Raises:
        ConfigError: if none stays within it.
    """
    chosen: dict[tuple[str, str], list[int]] = {}
    worst = {id(one): one.worst(precision) for one in found}
    for one in found:
        error = worst[id(one)]
        if error is not None and error <= limit:
            chosen.setdefault((one.transformer, one.module), []).append(one.layer)
    if not chosen:
        least = min((error for error in worst.values() if error is not None), default=math.inf)
        raise ConfigError(f"no Linear stays within a relative error of {limit:g}; the least is {least:.3g}, allow that")
    return LinearPlan(
        tuple(
            LinearRule(precision, (module,), tuple(layers), transformer)
            for (transformer, module), layers in chosen.items()
        )
    )
