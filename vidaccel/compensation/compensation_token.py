"""RazorAttention's compensation token: one key and value for everything that a query skips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Call, Compensation
from .registry import register
from .standins import attend_stand_ins

__all__ = ["CompensationToken"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class CompensationToken(Compensation):
    """Each query also attends the mean key and value of all tokens that its block skips, as often as there are.

    With N_i tokens skipped by query block i, and means over them, the logit q.kmean_i * scale + log N_i and the value
    vmean_i join the softmax over the kept keys. Exact where those tokens are all alike; where they are not, one mean of
    so many underestimates their weight. Source: RazorAttention, there for the tokens dropped from a cache, the same for
    all queries of a head; here each query block drops others.
    """

    name: ClassVar[str] = "compensation_token"
    lse: ClassVar[bool] = True

    def attend(self, call: Call) -> torch.Tensor:
        """The kernel's output with one more key for every block of queries that skips something."""
        heads = call.heads
        weight = (~call.kept).float() * heads.sizes
        count = weight.sum(-1)
        share = (weight / count.clamp(min=1).unsqueeze(-1)).expand(*heads.k_means.shape[:2], -1, -1)
        keys, values = share @ heads.k_means, share @ heads.v_means
        bias = count.log().expand(keys.shape[:-1])

        def stand_ins(b: int, h: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            k, v, logs = (x[b, h, blocks].unsqueeze(1) for x in (keys, values, bias))
            return k, v, logs

        return attend_stand_ins(call, 1, stand_ins)
