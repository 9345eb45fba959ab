"""No compensation: skipped blocks are as if they were not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Call, Compensation
from .registry import register

__all__ = ["Dropped"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Dropped(Compensation):
    """A softmax over the kept blocks alone."""

    name: ClassVar[str] = "none"
    any_blocks: ClassVar[bool] = True

    def attend(self, call: Call) -> torch.Tensor:
        """The kernel's output."""
        return call.sparse()
