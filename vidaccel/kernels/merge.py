"""Two attention results over disjoint keys into the one over both."""

from __future__ import annotations

import torch

__all__ = ["merge"]


def merge(
    out0: torch.Tensor, lse0: torch.Tensor, out1: torch.Tensor, lse1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint key sets, from the attention over each.

    out = out0 - sigmoid(lse1 - lse0) * (out0 - out1) and lse = log(exp(lse0) + exp(lse1)), natural logarithms.

    Args:
        out0, out1: [..., D], one floating dtype, finite.
        lse0, lse1: [...], -inf where a side had no keys, which then counts for nothing.

    Returns:
        The output [..., D], ``out0`` where neither side had keys, and the LSE [...].
    """
    weight = torch.sigmoid(lse1 - lse0)
    weight = weight.masked_fill(lse1.isneginf(), 0.0)  # where both are -inf their difference is NaN
    return torch.lerp(out0, out1, weight.unsqueeze(-1).to(out0.dtype)), torch.logaddexp(lse0, lse1)
