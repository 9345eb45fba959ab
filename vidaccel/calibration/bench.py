"""Times attention calls as a patched layer makes them, on random data, in turns with dense attention.

Patterns that remember find nothing to remember, because on random data everything changes from call to call.
Compensations that remember are timed over all calls of a short generation, so that costly and cheap ones are mixed as
they would be there.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..configs.plan import HeadPolicy, LayerPolicy
from ..engine.guard import what_is_wrong
from ..engine.prepare import prepare
from ..engine.run import run_heads
from ..kernels.dispatch import select
from ..layout import TokenLayout
from ..patterns.dynamic import Heads

__all__ = ["Run", "Timing", "rounds", "time_policies"]

_MOST_ROUNDS = 15
#: Calls between two of dense attention, so that it is never long ago.
_AT_A_TIME = 4
#: Layers of mixed policies that are timed.
_MIXES = 8
#: Calls of the short generation over which a compensation that remembers is timed.
_STEPS = 12


@dataclass(frozen=True, eq=False)
class Run:
    """Something to time: ``go`` makes so many calls."""

    go: Callable[[], object]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """What came out.

    Args:
        dense: median seconds of the dense calls.
        ratios: of each policy, the median of its times over that of the dense call before.
        mixing: what layers with a policy for each head took beyond the mean of their policies' ratios, mean over some
            random ones; ``None`` if there was nothing to mix.
    """

    dense: float
    ratios: tuple[float, ...]
    mixing: float | None


def time_policies(
    policies: Sequence[HeadPolicy],
    layout: TokenLayout,
    *,
    heads: int,
    head_dim: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_seconds: float,
    mix: bool,
) -> Timing:
    """Arguments as :func:`.cost.measure_costs` has them.

    Args:
        mix: whether layers of mixed policies are timed as well.

    Raises:
        KernelError: if a policy cannot run on this device.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    size = (batch, layout.tokens, heads, head_dim)
    q, k, v = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3))
    layout = TokenLayout.of(
        layout.grid,
        layout.tile_shape,
        text_tokens=layout.text_tokens,
        text_first=layout.text_first,
        device=device,
    )

    def dense() -> object:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    mixes = _mixes(policies, heads) if mix else []
    layers = [LayerPolicy((policy,)) for policy in policies] + [LayerPolicy(mixed) for mixed in mixes]
    calls = [_call(layer, layout, q, k, v) for layer in layers]
    with torch.no_grad():
        seconds, found = rounds(Run(dense), [call for call in calls if call is not None], device, budget_seconds)
    timed = iter(found)
    ratios = [1.0 if call is None else next(timed) for call in calls]
    alone = {HeadPolicy(): 1.0, **dict(zip(policies, ratios, strict=False))}
    beyond = [
        ratio - statistics.fmean(alone[policy] for policy in mixed)
        for mixed, ratio in zip(mixes, ratios[len(policies) :], strict=True)
    ]
    return Timing(seconds, tuple(ratios[: len(policies)]), statistics.fmean(beyond) if beyond else None)


def _mixes(policies: Sequence[HeadPolicy], heads: int) -> list[tuple[HeadPolicy, ...]]:
    """Random policies for each head, of one precision a layer, as a plan has them; plain dense attention among them."""
    draw = random.Random(0)
    found = []
    for _ in range(_MIXES):
        precision = draw.choice(policies).precision if policies else "native"
        fit = [HeadPolicy()] * (precision == "native") + [p for p in policies if p.precision == precision]
        mixed = tuple(draw.choice(fit) for _ in range(heads))
        if len(set(mixed)) > 1:
            found.append(mixed)
    return found


def rounds(
    dense: Run, runs: Sequence[Run], device: torch.device, budget_seconds: float, most: int = _MOST_ROUNDS
) -> tuple[float, list[float]]:
    """Median seconds of a call of ``dense``, and each run's median ratio to it, taken in turns.

    Args:
        budget_seconds: no new round begins that would not end within it; there is one in any case.
        most: rounds at most.
    """
    for run in (dense, *runs):  # compilation and first touches
        run.go()
    times: list[float] = []
    ratios: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for done in range(1, most + 1):
        for number in range(max(1, len(runs))):
            if number % _AT_A_TIME == 0:
                times.append(_seconds(dense, device))
            if runs:
                ratios[number].append(_seconds(runs[number], device) / times[-1])
        if (time.perf_counter() - start) * (done + 1) / done > budget_seconds:
            break
    return statistics.median(times), [statistics.median(found) for found in ratios]


def _call(layer: LayerPolicy, layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run | None:
    """What a patched layer runs, guard included; ``None`` if that is dense attention."""
    groups = [(select(group.request(q)), group) for group in prepare(layer, q.shape[2], layout)]
    if not groups:
        return None
    steps = _STEPS if any(group.compensation.stateful for _, group in groups) else 1

    def run() -> None:
        memories: list[dict[str, Any]] = [{} for _ in groups]
        for step in range(steps):
            # each time anew, because it remembers what patterns computed from it
            heads = Heads(q, k, v, layout, noise_level=1 - (step + 0.5) / steps, step=step)
            out = torch.empty_like(q)
            for (kernel, group), memory in zip(groups, memories, strict=True):
                memory.pop("pattern", None)
                result, _ = run_heads(kernel, group, group.of(heads), memory)
                if group.heads is None:
                    out = result
                else:
                    out.index_copy_(2, group.heads, result)
            what_is_wrong(out, v)

    return Run(run, steps)


def _seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run.go()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / run.calls
