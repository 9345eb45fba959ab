"""Seconds of one attention call under each candidate, measured on this machine.

The real kernels run on random q, k and v, all heads under one policy, planning included, in rounds that take turns
with dense attention. A candidate's time is the median of its ratios to the dense call just before, times the median
of the dense calls: what else the machine does disturbs both alike. For a GPU that is not here see :mod:`.predicted`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..configs.codec import policy_from_data, policy_to_data, take
from ..configs.plan import HeadPolicy
from ..device import device_info
from ..errors import ConfigError
from ..layout import TokenLayout
from .bench import time_policies
from .cost_store import CostStore, cost_cache

__all__ = ["Costs", "cost_cache", "device_name", "measure_costs"]

_ORIGINS = ("measured", "predicted")
_COSTS_KEYS = ("device", "origin", "dense", "mixing", "seconds")


@dataclass(frozen=True)
class Costs:
    """What one attention call of a whole layer takes.

    Args:
        device: name of the device.
        origin: ``"measured"`` or ``"predicted"``.
        dense: seconds of the call that the unpatched layer makes.
        table: seconds of the call with all heads under one policy.
        mixing: seconds that a layer with several policies takes beyond the mean of theirs, on average: its block
            lists are not shared, and it may need several kernel calls.

    Raises:
        ConfigError: if the origin is unknown, or a time not above 0.
    """

    device: str
    origin: str
    dense: float
    table: Mapping[HeadPolicy, float]
    mixing: float = 0.0

    def __post_init__(self) -> None:
        if self.origin not in _ORIGINS:
            raise ConfigError(f"Costs.origin is {self.origin!r}; valid are {', '.join(_ORIGINS)}")
        for found in (self.dense, *self.table.values()):
            if not isinstance(found, int | float) or not 0 < found < math.inf:
                raise ConfigError(f"a cost is {found!r}; give seconds above 0")
        if not isinstance(self.mixing, int | float) or not math.isfinite(self.mixing):
            raise ConfigError(f"Costs.mixing is {self.mixing!r}; give a finite number")

    def knows(self, policy: HeadPolicy) -> bool:
        """Whether :meth:`seconds` can tell this policy's."""
        return policy.is_dense or policy in self.table

    def seconds(self, policy: HeadPolicy) -> float:
        """Seconds of the call with all heads under ``policy``.

        Raises:
            ConfigError: if nothing is known about it.
        """
        if policy.is_dense:
            return self.dense
        if policy not in self.table:
            raise ConfigError(f"the cost of {policy} on {self.device} is not known; measure or predict it first")
        return self.table[policy]

    def layer(self, heads: Sequence[HeadPolicy]) -> float:
        """Seconds of the call with a policy for each head.

        Raises:
            ConfigError: if there are none, or nothing is known about one.
        """
        if not heads:
            raise ConfigError("a layer has no policies; give one for each head")
        mean = fmean(self.seconds(policy) for policy in heads)
        return mean if len(set(heads)) == 1 else max(0.0, mean + self.mixing)

    @property
    def best_ratio(self) -> float:
        """Seconds of the fastest policy over those of dense attention, at most 1."""
        return min([1.0, *(seconds / self.dense for seconds in self.table.values())])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        listed = [{"policy": policy_to_data(policy), "seconds": found} for policy, found in self.table.items()]
        return {
            "device": self.device,
            "origin": self.origin,
            "dense": self.dense,
            "mixing": self.mixing,
            "seconds": listed,
        }

    @staticmethod
    def from_dict(data: object) -> Costs:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: if the data has another form.
        """
        given = take(data, _COSTS_KEYS, "the costs")
        if set(given) != set(_COSTS_KEYS) or not isinstance(given["seconds"], list):
            raise ConfigError(f"the costs lack one of {', '.join(_COSTS_KEYS)}, or seconds is no list; measure again")
        rows = [take(row, ("policy", "seconds"), "an entry of the costs") for row in given["seconds"]]
        if any(len(row) != 2 for row in rows):
            raise ConfigError("an entry of the costs lacks its policy or its seconds; measure again")
        found = {policy_from_data(row["policy"]): row["seconds"] for row in rows}
        return Costs(given["device"], given["origin"], given["dense"], found, given["mixing"])


def measure_costs(
    policies: Sequence[HeadPolicy],
    layout: TokenLayout,
    *,
    heads: int,
    head_dim: int,
    batch: int,
    dtype: torch.dtype,
    device: str | torch.device,
    budget_seconds: float = 20.0,
    cache: Path | None = None,
) -> Costs:
    """Times one attention call per policy on this machine.

    Patterns that choose their blocks in each call are timed with that choice, on random data and with nothing
    remembered of an earlier call. Compensations that remember are timed over the calls of a short generation.

    Args:
        policies: what to time; plain dense attention is timed in any case.
        layout: token order and blocks of the whole sequence.
        heads, head_dim, batch: H, D and B of q, k and v [B,S,H,D].
        budget_seconds: no new round begins that would not end within it; the first round always runs.
        cache: folder where times are kept for the same device, versions and shape, such as :func:`cost_cache`;
            ``None`` measures everything and keeps nothing.

    Raises:
        KernelError: if a policy cannot run on this device.
        ConfigError: if the cache file is damaged.
        OutputError: if it cannot be written.
    """
    where = torch.device(device)
    name = device_name(where)
    wanted = [policy for policy in dict.fromkeys(policies) if not policy.is_dense]
    shape = _shape_text(layout, heads, head_dim, batch, dtype)
    stored = None if cache is None else CostStore(cache, name)
    known = {} if stored is None else stored.read(shape)
    missing = [policy for policy in wanted if _key(policy) not in known.get("policies", {})]
    if missing or not known:
        found = time_policies(
            missing,
            layout,
            heads=heads,
            head_dim=head_dim,
            batch=batch,
            dtype=dtype,
            device=where,
            budget_seconds=budget_seconds,
            mix=known.get("mixing") is None,
        )
        dense = known.get("dense", found.dense)  # all times of an entry are multiples of one dense time
        times = {_key(policy): ratio * dense for policy, ratio in zip(missing, found.ratios, strict=True)}
        mixing = known.get("mixing") if found.mixing is None else found.mixing * dense
        known = {"dense": dense, "mixing": mixing, "policies": {**known.get("policies", {}), **times}}
        if stored is not None:
            stored.write(shape, known)
    table = {policy: known["policies"][_key(policy)] for policy in wanted}
    return Costs(name, "measured", known["dense"], table, known["mixing"] or 0.0)


def _shape_text(layout: TokenLayout, heads: int, head_dim: int, batch: int, dtype: torch.dtype) -> str:
    """One text per shape."""
    text = f" + {layout.text_tokens} text {'first' if layout.text_first else 'last'}" if layout.text_tokens else ""
    sizes = f"batch {batch}, {heads} heads of {head_dim}"
    return f"{layout.grid}{text}, tile {layout.tile_shape}, {sizes}, {str(dtype).removeprefix('torch.')}"


def _key(policy: HeadPolicy) -> str:
    return json.dumps(policy_to_data(policy), sort_keys=True)


def device_name(device: torch.device) -> str:
    """What costs are filed under: the name of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{device_info().cpu}, {torch.get_num_threads()} threads"
    return device.type
