"""Which 8-bit Linears can run where, each with the reason if not. torchao computes them; it is imported when needed."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

import torch
from torch import nn

from ..configs.linear import LINEAR_PRECISIONS
from ..errors import ConfigError

__all__ = ["MIN_TORCHAO", "config_of", "why_no_torchao", "why_not", "why_not_linear", "why_not_table"]

#: The oldest torchao that is known to work with the torch that is tested.
MIN_TORCHAO = (0, 13)

_INSTALL = "pip install 'vidaccel[linear]'"
_HALVES = (torch.float32, torch.bfloat16, torch.float16)
# Turing is the first whose tensor cores multiply int8; torchao asks for Ada for float8
_CAPABILITY = {"int8": (7, 5), "fp8": (8, 9)}
#: Sizes of a weight that the GPU's matrix product takes: multiples of these. On a CPU any size will do.
_MULTIPLE = {"int8": 8, "fp8": 16}


def why_no_torchao() -> str | None:
    """One sentence on why torchao cannot be used, or ``None``; imports nothing."""
    try:
        found = metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return f"torchao is not installed; {_INSTALL}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < MIN_TORCHAO:
        return f"torchao {found} is older than {'.'.join(map(str, MIN_TORCHAO))}; {_INSTALL} --upgrade"
    return None


def why_not(precision: str, device: str | torch.device) -> str | None:
    """One sentence on why Linears of this precision cannot run on a device, or ``None``.

    Args:
        precision: ``"int8"`` or ``"fp8"``.
        device: where the model computes.
    """
    missing = why_no_torchao()
    if missing is not None:
        return missing
    where, least = torch.device(device), _CAPABILITY[precision]
    needed = f"{precision} Linears need a CUDA device of compute capability {least[0]}.{least[1]} or later"
    if where.type == "cpu":
        return None if precision == "int8" else f"{needed}, and this device is the CPU"
    if where.type != "cuda":
        return f"{needed}{', or a CPU' if precision == 'int8' else ''}, and this device is {where.type}"
    if not torch.cuda.is_available():
        return f"{needed}, and torch finds none"
    found = torch.cuda.get_device_capability(where)
    if found < least:
        return f"{needed}, and this one has {found[0]}.{found[1]}"
    return None


def why_not_table(device: str | torch.device) -> dict[str, str | None]:
    """:func:`why_not` of every 8-bit precision."""
    return {precision: why_not(precision, device) for precision in LINEAR_PRECISIONS if precision != "native"}


def why_not_linear(linear: nn.Linear, precision: str, device: torch.device) -> str | None:
    """Why torchao cannot take this Linear, or ``None``; what holds for the device is :func:`why_not`'s.

    Args:
        device: where it computes, which for offloaded models is not where its weight lies.
    """
    weight = linear.weight
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, not a plain nn.Linear"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__} already"
    if weight.dtype not in _HALVES:
        return f"its weight is stored as {_word(weight.dtype)} already"
    if weight.is_meta:
        return "its weight is not in memory (sequential offloading)"
    if precision == "fp8" and weight.dtype != torch.bfloat16:
        return f"fp8 takes weights in bfloat16, and its weight is {_word(weight.dtype)}"
    multiple = _MULTIPLE[precision]
    if device.type == "cuda" and any(size % multiple for size in weight.shape):
        sizes = "x".join(map(str, weight.shape))
        return f"{precision} takes sizes that are multiples of {multiple}, and its weight is {sizes}"
    return None


def config_of(precision: str) -> Any:
    """torchao's configuration of a precision: dynamic inputs, a scale for each token and each output channel.

    Raises:
        ConfigError: if torchao is missing or too old.
    """
    missing = why_no_torchao()
    if missing is not None:
        raise ConfigError(missing)
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )

    # its recommended settings of the compiler are global and would outlive the patch
    if precision == "int8":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
