"""NVFP4, emulated: numbers of 4 bits (E2M1) in groups of 16 that share a scale of 8 bits (E4M3).

::

    scale = e4m3(max|x| / 6)        x' = e2m1(x / scale) * scale

E2M1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6; roundings go to the nearest, ties to the even mantissa, and what
lies beyond the largest becomes the largest. A group whose scale rounds to zero becomes zeros.

Softmax weights lie in [0, 1], so their scales would use only a small part of E4M3. SageAttention3 scales each row of
a key block so that its largest weight becomes 6 * 448 first, and takes that factor back in float32: the two levels.

Source: SageAttention3 (microscaling FP4 attention). There a block has 128 keys; here it is one block of the layout.
"""

from __future__ import annotations

import torch

__all__ = ["E2M1_MAX", "GROUP", "round_e2m1", "round_e4m3", "round_nvfp4", "round_rows_in_two_levels"]

#: Values that share a scale.
GROUP = 16
#: Largest E2M1.
E2M1_MAX = 6.0
_E4M3_MAX = 448.0


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 values of ``x``, any shape, in its own dtype."""
    size = x.abs().clamp(max=E2M1_MAX)
    # the spacing is 0.5 below 2, 1 below 4 and 2 above; torch.round goes to even, which here is the even mantissa
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign((size / step).round() * step, x)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest float8_e4m3fn values of ``x``, as float32; beyond the largest it is the largest, not NaN."""
    return x.float().clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def round_nvfp4(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., N] in NVFP4 and back, float32: groups of 16 along the last axis, the last group may be shorter."""
    length = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -length % GROUP)).unflatten(-1, (-1, GROUP))
    scale = round_e4m3(groups.abs().amax(-1, keepdim=True) / E2M1_MAX)
    rounded = round_e2m1(groups / torch.where(scale == 0, 1.0, scale)) * scale
    return rounded.flatten(-2)[..., :length]


def round_rows_in_two_levels(p: torch.Tensor) -> torch.Tensor:
    """Weights ``p`` [..., N] of one key block, at least 0, in NVFP4 with a float32 scale a row: float32."""
    p = p.float()
    first = p.amax(-1, keepdim=True) / (E2M1_MAX * _E4M3_MAX)
    first = torch.where(first == 0, 1.0, first)  # a row of zeros, or of weights too small for float32
    return round_nvfp4(p / first) * first
