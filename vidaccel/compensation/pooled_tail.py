"""The pooled tail: the means of skipped blocks stand in for them, inside the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Call, Compensation
from .registry import register

__all__ = ["PooledTail"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class PooledTail(Compensation):
    """Each query also attends the mean key and value of every block it skips, as often as the block has tokens.

    Logits q.kmean_j * scale + log n_j and values vmean_j join the softmax over the kept keys. Our default; see the end
    of the kernel contract in :class:`vidaccel.kernels.contract.Kernel`.
    """

    name: ClassVar[str] = "pooled_tail"
    any_blocks: ClassVar[bool] = True
    tail: ClassVar[bool] = True

    def attend(self, call: Call) -> torch.Tensor:
        """The kernel's output with its tail."""
        return call.sparse(tail=True)
