"""Factors on the channels of Q and K that even out their ranges before rounding, and cancel in the product.

::

    q' = q * f,   k' = k / f,   f_c = sqrt(range of k_c / range of q_c)        so that q' k'^T = q k^T

One factor a channel is FireQ's post-RoPE scaling. One factor for the channels 2i and 2i+1 is its pre-RoPE scaling: a
rotary embedding turns these two into each other, so a common factor commutes with it, and as the range is that of the
pair's length, which a rotation keeps, the factor is the same before and after it. The assumption is that pairs are
neighbours, as diffusers has them for Wan, HunyuanVideo and CogVideoX. Cosmos turns channels i and i + D/2: the product
is then still exact, but our pairs are not those of the embedding.

FireQ gives K's whole range to Q, because its queries are in fp8, which does not mind. Here both have the same format,
so each gets half of it (in logarithms). FireQ's factors are calibrated; these are taken from the call.

Source: FireQ (INT4-FP8 kernel and RoPE-aware quantisation).
"""

from __future__ import annotations

import torch

from ..errors import KernelError
from ..types import ChannelScaling

__all__ = ["channel_factors", "scale_channels"]


def channel_factors(q: torch.Tensor, k: torch.Tensor, scaling: ChannelScaling) -> torch.Tensor:
    """Factors f for q and k [..., S, D], float32 [..., 1, D]; ones where a channel of either is all zeros.

    Raises:
        KernelError: for "pairs" with an odd number of channels.
    """
    if scaling == "none":
        return torch.ones_like(q[..., :1, :], dtype=torch.float32)
    q_range, k_range = (_ranges(x.float(), scaling) for x in (q, k))
    empty = (q_range == 0) | (k_range == 0)
    return torch.where(empty, 1.0, (k_range / torch.where(empty, 1.0, q_range)).sqrt())


def scale_channels(q: torch.Tensor, k: torch.Tensor, scaling: ChannelScaling) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [..., S, D] with even ranges and the same product, in their own dtypes.

    Raises:
        KernelError: for "pairs" with an odd number of channels.
    """
    if scaling == "none":
        return q, k
    factors = channel_factors(q, k, scaling)
    return (q * factors).to(q.dtype), (k / factors).to(k.dtype)


def _ranges(x: torch.Tensor, scaling: ChannelScaling) -> torch.Tensor:
    if scaling == "channels":
        return x.abs().amax(-2, keepdim=True)
    if x.shape[-1] % 2:
        raise KernelError(f"{x.shape[-1]} channels cannot be scaled by pairs; use scale_channels='channels'")
    lengths = torch.linalg.vector_norm(x.unflatten(-1, (-1, 2)), dim=-1)
    return lengths.amax(-2, keepdim=True).repeat_interleave(2, dim=-1)
