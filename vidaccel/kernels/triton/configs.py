"""How to launch the forward kernel: tile sizes, warps and stages for each architecture, as data with their origin.

The table is ``configs.yaml`` beside this file. An entry's origin is ``gate`` (chosen because its machine code has no
spills and the right tensor-core instructions, never timed) or ``measured`` (timed on that architecture). What somebody
tuned on their own device (:mod:`.tuned`) comes before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import torch
import yaml

from ...errors import KernelError
from ...types import Precision

__all__ = ["Config", "Entry", "arch_of", "choose", "for_rule", "for_skipping", "kind_of", "table"]

#: The architecture whose sizes the interpreter imitates.
_INTERPRETED = 90


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Args:
        block_m: most query rows of one program.
        block_n: most keys of one step.
        warps: warps of a program.
        stages: key pieces in flight.
        warp_specialize: whether a warp of its own loads while the others compute (Hopper).
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    warp_specialize: bool = False


@dataclass(frozen=True)
class Entry:
    """A row of the table: ``config`` serves ``arch`` for this kind of precision, up to ``head_dim`` channels."""

    arch: int
    kind: str
    head_dim: int
    config: Config
    origin: str


@cache
def table() -> tuple[Entry, ...]:
    """All entries of ``configs.yaml``."""
    rows: list[dict[str, Any]] = yaml.safe_load(resources.files(__package__).joinpath("configs.yaml").read_text())
    return tuple(
        Entry(row["arch"], row["kind"], row["head_dim"], Config(**row["config"]), row["origin"]) for row in rows
    )


def kind_of(dtype: torch.dtype, precision: Precision) -> str:
    """Which configurations a call uses: ``native16``, ``native32``, ``int8``, ``int8-fp8`` or ``fp8-fp8``.

    Inputs of 8-bit precisions are converted anyway, so only V's dtype matters there, and only with native PV.
    """
    if precision.pv == "fp8":
        return f"{precision.qk}-fp8"
    if dtype == torch.float32:
        return "native32"  # with int8 scores as well: the float32 product decides the registers
    return "native16" if precision.qk == "native" else precision.qk


def arch_of(device: torch.device) -> int:
    """Compute capability of a device as the table writes it, 90 for 9.0; the newest known one not above it."""
    if device.type != "cuda":
        return _INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted({entry.arch for entry in table()})
    return max((arch for arch in known if arch <= 10 * major + minor), default=known[0])


def choose(arch: int, kind: str, head_dim: int, block_tokens: int) -> Config:
    """The configuration for blocks of at most ``block_tokens`` tokens.

    Of those for enough channels, the one with the fewest query rows that holds a whole block; if none does, the one
    with the most.

    Raises:
        KernelError: if the table has nothing for these.
    """
    fits = [e for e in table() if e.arch == arch and e.kind == kind and e.head_dim >= head_dim]
    if not fits:
        most = max((e.head_dim for e in table() if e.arch == arch and e.kind == kind), default=0)
        known = f"at most {most}" if most else "of no size"
        raise KernelError(f"sm_{arch} has configurations for {kind} with head dims {known}, not {head_dim}")
    least = min(e.head_dim for e in fits)
    sizes = [e.config for e in fits if e.head_dim == least]
    return min(sizes, key=lambda c: (c.block_m < block_tokens, c.block_m if c.block_m >= block_tokens else -c.block_m))


def for_skipping(config: Config) -> Config:
    """The configuration for a kernel that skips: a branch in the loop rules out specialised warps, and without them
    128 query rows take 8 warps and 64 keys a step."""
    if not config.warp_specialize:
        return config
    return replace(
        config,
        block_n=min(config.block_n, 64),
        warps=8 if config.block_m == 128 else 4,
        warp_specialize=False,
    )


def for_rule(config: Config, head_dim: int, arch: int) -> Config:
    """The configuration for a kernel in which a rule over tokens cuts key pieces: here too the branch rules out
    specialised warps, and above 128 channels larger tiles or fewer warps would spill registers."""
    config = for_skipping(config)
    if head_dim <= 128 or config.block_m < 64:
        return config
    if arch == 90:  # whose products are of 64 rows: more than one warpgroup would share them
        return replace(config, block_m=64, block_n=min(config.block_n, 64), warps=4, stages=2)
    return replace(config, block_m=64, block_n=min(config.block_n, 32), warps=8)
