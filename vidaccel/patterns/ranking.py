"""Which entries of a score to keep: the largest of each row, or as many as hold a share of its mass.

Text takes part in a softmax over blocks but is kept in any case, so what it holds counts as kept before the first video
block does.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from .dynamic import Heads

__all__ = ["block_probabilities", "blocks_of", "keep_counted", "keep_largest", "keep_mass", "keep_tokens", "split_text"]


def block_probabilities(heads: Heads) -> torch.Tensor:
    """Estimated attention of each video block over all blocks, float32 [B,H,NV,NB]: softmax of logits + log n_j.

    The logits are those of the mean query and the mean key; n_j, the tokens of block j, matters where blocks differ.
    """
    return (heads.pooled_logits[:, :, heads.layout.video_blocks] + heads.sizes.log()).softmax(-1)


def split_text(heads: Heads, probability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``probability`` [..., NB] as that of the video blocks [..., NV] and the sum over the text blocks [..., 1]."""
    layout = heads.layout
    return probability[..., layout.video_blocks], probability[..., layout.text_blocks].sum(-1, keepdim=True)


def keep_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Marks the ``count`` largest entries along the last axis, bool like ``scores``; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def keep_counted(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As :func:`keep_largest` with a count for each row, [..., 1]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(scores.shape[-1], device=scores.device) < counts
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept.expand(order.shape))


def keep_tokens(scores: torch.Tensor, sizes: torch.Tensor, tokens: float) -> torch.Tensor:
    """Marks the largest entries of each row, as many as hold nearest to so many tokens and at least one.

    Args:
        scores: [..., N].
        sizes: int32, tokens of each entry, broadcasts to ``scores``.
        tokens: what a row is to hold.

    Returns:
        bool like ``scores``.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    sizes = sizes.expand(scores.shape).gather(-1, order)
    kept = sizes.cumsum(-1, dtype=torch.int32) - sizes / 2 <= tokens
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def keep_mass(
    probability: torch.Tensor,
    mass: float,
    *,
    held: torch.Tensor | float = 0.0,
    least: int = 1,
    most: int | None = None,
    count: Literal["reach", "beyond", "within"] = "reach",
) -> torch.Tensor:
    """Marks the largest entries of each row, by what they hold together, bool like ``probability``.

    Args:
        probability: [..., N], at least 0.
        held: mass that is kept already, [..., 1].
        least, most: bounds of the number of entries in a row; ``None`` for N.
        count: ``"reach"`` keeps the smallest set whose mass is >= ``mass``; ``"within"`` the largest whose mass is <=
            ``mass``, #{cumulated <= mass}; ``"beyond"`` one entry more than that.
    """
    sums = probability.sort(dim=-1, descending=True).values.cumsum(-1) + held
    short = (sums < mass) if count == "reach" else (sums <= mass)
    counts = short.sum(-1, keepdim=True) + (count != "within")
    if count == "reach":  # what is held may be enough on its own
        counts = counts - (torch.as_tensor(held, device=counts.device) >= mass).to(counts.dtype)
    return keep_counted(probability, counts.clamp(least, probability.shape[-1] if most is None else most))


def blocks_of(density: float, blocks: int) -> int:
    """``density`` of so many blocks, rounded up, at least one. Shares such as .3 are no exact floats: .3 of 10 is 3."""
    return max(1, min(blocks, math.ceil(density * blocks - 1e-9)))
