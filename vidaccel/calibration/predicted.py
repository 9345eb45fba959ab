"""What can be said before anything is measured: times on a GPU that is not here, and the most a plan could gain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..configs.plan import HeadPolicy
from ..errors import ConfigError, KernelError
from ..kernels.triton import lacks
from ..kernels.triton.configs import choose, kind_of, table
from ..kernels.triton.costmodel import Hardware, hardware, predict, step_of
from ..layout import TokenLayout
from ..patterns import build_pattern
from ..patterns.base import StaticPattern
from ..types import PRECISIONS
from .cost import Costs
from .observations import Observations

__all__ = ["WORTH_IT", "ceiling", "costs_on", "find_gpu", "half_of", "predict_costs", "say_ceiling", "why_not_on"]

#: Least end-to-end speed-up that is worth a calibration.
WORTH_IT = 1.05


def predict_costs(
    policies: Sequence[HeadPolicy],
    layout: TokenLayout,
    *,
    heads: int,
    head_dim: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
    densities: Mapping[HeadPolicy, float] | None = None,
) -> Costs:
    """Seconds as the kernels' cost model has them, for a GPU that is not here.

    Dense attention is predicted as the same kernel with every block. Choosing blocks at run time and making 8-bit
    copies are not part of the model, so these times are lower bounds. Arguments as :func:`.cost.measure_costs` has
    them.

    Args:
        device: the GPU's name, as the maker writes it; see :func:`find_gpu`.
        densities: kept token pairs over all, text included, of policies that choose their blocks in each call, where
            that was observed; without it, what the pattern aims at counts.

    Raises:
        ConfigError: if the GPU is unknown, or a pattern's density depends on the input and was not observed.
        KernelError: if that GPU cannot run a policy, or the model has no figures for it.
    """
    gpu = find_gpu(device)

    def seconds(policy: HeadPolicy) -> float:
        lacking = why_not_on(gpu, policy, layout, dtype=dtype, head_dim=head_dim)
        if lacking:
            raise KernelError(f"the time of {policy} on {gpu.name} cannot be predicted: {lacking}")
        pattern = build_pattern(policy.pattern)
        tail = policy.tail
        mask = density = None
        if isinstance(pattern, StaticPattern):
            mask = pattern.mask(layout)
            tail = tail and not mask.is_full()
        elif densities is not None and policy in densities:
            density = densities[policy]
        else:
            density = pattern.density(layout)
            if density is None:
                raise ConfigError(f"the density of {policy} depends on the input, so its time cannot be predicted")
            density = 1 - (1 - density) * (layout.grid.tokens / layout.tokens) ** 2  # text is always kept
        found = predict(
            gpu.arch,
            PRECISIONS[policy.precision],
            head_dim,
            layout,
            heads=heads,
            batch=batch,
            mask=mask,
            density=density,
            tail=tail,
            dtype=dtype,
            on=gpu,
        )
        return found.seconds

    wanted = [policy for policy in dict.fromkeys(policies) if not policy.is_dense]
    return Costs(device, "predicted", seconds(HeadPolicy()), {policy: seconds(policy) for policy in wanted})


def costs_on(name: str, seen: Observations) -> Costs:
    """:func:`predict_costs` for the candidates and shapes of these observations, for 16-bit inputs.

    Candidates that this GPU cannot run, or the model has no figures for, are left out.

    Raises:
        ConfigError: if the GPU is unknown, or the observations do not tell the shape of a call.
    """
    gpu = find_gpu(name)
    if seen.shape is None or seen.fingerprint.grid is None:
        raise ConfigError(
            "these observations do not tell the shape of an attention call, so no time can be predicted;"
            " run vidaccel calibrate again"
        )
    layout = seen.shape.layout(seen.fingerprint.grid, seen.tile)
    dtype = half_of(seen.shape.torch_dtype)
    head_dim = seen.shape.head_dim
    able = [p for p in seen.candidates if why_not_on(gpu, p, layout, dtype=dtype, head_dim=head_dim) is None]
    if HeadPolicy() not in able:
        lacking = why_not_on(gpu, HeadPolicy(), layout, dtype=dtype, head_dim=head_dim)
        raise ConfigError(f"the times of this model on {gpu.name} cannot be predicted: {lacking}")
    kept = {
        policy: float(np.mean([cell.density[number].mean() for cell in seen.cells.values()]))
        for number, policy in enumerate(seen.candidates)
        if seen.cells
    }
    return predict_costs(
        able, layout, heads=seen.shape.heads, head_dim=head_dim, batch=seen.shape.batch, dtype=dtype,
        device=gpu.name, densities=kept,
    )  # fmt: skip


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype that a model watched in this one would run in on a GPU."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def why_not_on(
    gpu: Hardware, policy: HeadPolicy, layout: TokenLayout, *, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why the kernels cannot run a policy on a GPU that is not here or the model not predict it, or ``None``.

    Arguments as :func:`.cost.measure_costs` has them.
    """
    precision = PRECISIONS[policy.precision]
    lacking = lacks(divmod(gpu.arch, 10), precision)
    if lacking:
        return lacking
    kind = kind_of(dtype, precision)
    try:
        config = choose(gpu.arch, kind, head_dim, int(layout.block_sizes.max()))
        step_of(gpu.arch, kind, head_dim, config, tail=policy.tail)
    except KernelError as error:
        return str(error)
    return None


def find_gpu(name: str) -> Hardware:
    """The GPU that the cost model knows by this name: "H200" and "NVIDIA H200" are the same.

    Raises:
        ConfigError: if it knows none; the message lists them.
    """
    known = [hardware(arch) for arch in sorted({entry.arch for entry in table()})]
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    for gpu in known:
        # the model is the first word with a digit: A100, 4090, H200; memory and form factor come after it
        if next(word for word in gpu.name.lower().split() if re.search(r"\d", word)) in words:
            return gpu
    raise ConfigError(f"nothing is known about a GPU {name!r}; known are {', '.join(gpu.name for gpu in known)}")


def ceiling(total_seconds: float, attention_seconds: float, best_ratio: float) -> float:
    """The end-to-end speed-up that no plan can exceed, by Amdahl's law.

    Args:
        total_seconds: of a whole dense generation.
        attention_seconds: of it, in self-attention.
        best_ratio: seconds of the fastest candidate over those of dense attention.

    Raises:
        ConfigError: if attention takes longer than the whole, or a number is out of range.
    """
    if not 0 < total_seconds < float("inf") or not 0 <= attention_seconds <= total_seconds or not 0 < best_ratio <= 1:
        raise ConfigError(
            f"attention takes {attention_seconds} of {total_seconds} s and the fastest candidate {best_ratio} of it;"
            " valid is 0 <= attention <= total, above 0, and a ratio above 0 and at most 1"
        )
    return total_seconds / (total_seconds - attention_seconds * (1 - best_ratio))


def say_ceiling(total_seconds: float, attention_seconds: float, best_ratio: float) -> str:
    """:func:`ceiling` in words; below 1.05 they say that a calibration is not worth its time."""
    limit = ceiling(total_seconds, attention_seconds, best_ratio)
    text = (
        f"Attention takes {attention_seconds / total_seconds:.0%} of a dense generation at these shapes, and the"
        f" fastest candidate needs {best_ratio:.0%} of its time: no plan can be faster than {limit:.2f}x end to end."
    )
    if limit < WORTH_IT:
        text += " There is nothing to win here; longer or larger videos have more attention to save."
    return text
