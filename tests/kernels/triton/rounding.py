"""Where compiled kernels round 8-bit values otherwise than torch does."""

from __future__ import annotations

import torch
import triton

from vidaccel.kernels.triton.configs import arch_of

__all__ = ["rounds_twice", "units"]


def units(values: torch.Tensor) -> torch.Tensor:
    """8-bit values as whole numbers whose neighbours differ by 1: int8 itself, float8 by rank."""
    if values.dtype == torch.int8:
        return values.int()
    bits = values.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def rounds_twice(dtype: torch.dtype) -> bool:
    """Whether float32 becomes fp8 by way of fp16: Triton 3.6 for sm_89 cuts to fp16 first (``cvt.rz.f16.f32``), 3.9 no
    longer does.

    fp16 has 128 values for each of e4m3. What lies within one of them above a tie becomes the tie, which rounds to
    even: one value in 256 is off by a unit.
    """
    version = triton.__version__.startswith("3.6.")
    return dtype == torch.float8_e4m3fn and arch_of(torch.device("cpu")) == 89 and version
