"""Where compiled kernels round 8-bit values otherwise than torch does."""

from __future__ import annotations

import pytest
import torch
import triton

from vidaccel.kernels import quantise

__all__ = ["oracle_rounds_as", "rounds_twice", "units"]


def units(values: torch.Tensor) -> torch.Tensor:
    """8-bit values as whole numbers whose neighbours differ by 1: int8 itself, float8 by rank."""
    if values.dtype == torch.int8:
        return values.int()
    bits = values.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def rounds_twice(arch: int) -> bool:
    """Whether float32 becomes fp8 by way of fp16: Triton 3.6 for sm_89 cuts to fp16 first (``cvt.rz.f16.f32``), 3.9 no
    longer does.

    fp16 has 128 values for each of e4m3. What lies within one of them above a tie becomes the tie, which rounds to
    even: one value in 256 is the neighbour's.
    """
    return arch == 89 and triton.__version__.startswith("3.6.")


def oracle_rounds_as(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the oracle round to fp8 as kernels for ``arch`` do, so that results can be equal to the last bit."""
    once = quantise._to_fp8

    def twice(x: torch.Tensor, largest: torch.Tensor, most: float = quantise.FP8_MAX) -> quantise.Quantised:
        scale = once(x, largest, most).scale
        half = (x / scale).half()
        towards_zero = torch.nextafter(half, torch.zeros_like(half))
        cut = torch.where(half.abs() > (x / scale).abs(), towards_zero, half)
        return quantise.Quantised(cut.to(torch.float8_e4m3fn), scale)

    if rounds_twice(arch):
        monkeypatch.setattr(quantise, "_to_fp8", twice)
