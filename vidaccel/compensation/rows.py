"""Rows of an output: which of them a compensation is about, and the digits it computes with."""

from __future__ import annotations

import torch

from .base import Call

__all__ = ["skipping_blocks", "wide"]


def skipping_blocks(call: Call) -> torch.Tensor:
    """Blocks of queries that skip something, be it a part of a block: bool [1 or B, 1 or H, NB] on the device of q."""
    partial = call.blocks.partial.to(call.kept.device)
    return ~(call.kept & ~partial).all(-1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32; in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
