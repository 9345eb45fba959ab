"""Re-ttention: what sparse attention lacked at the last full step is added to the steps after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import ConfigError
from ..patterns.dynamic import HeadOrder
from ..patterns.params import check_count
from .base import Call, Compensation
from .registry import register
from .rows import skipping_blocks, wide

__all__ = ["Rettention"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Rettention(Compensation):
    """O = rho * O_sparse + R between full steps, rho and R from the last of them.

    A full step, the first that a layer sees of a run and every ``period``-th after it, runs attention over all and over
    the kept blocks, and returns the former. Left behind are rho = exp(LSE_sparse - LSE_full), the share of the
    attention that the kept blocks hold, and R = O_full - rho * O_sparse, what the others add. The k-th step after it
    takes rho + (k - 1) * growth, not bounded by 1 (as published). Steps are those of the scheduler, so that one
    repeated or skipped changes nothing for the others. Source: Re-ttention, published with a fixed pattern.

    rho and R belong to the blocks they were measured with: between full steps those blocks are attended, also if the
    pattern chooses in each call. A pattern that sorts tokens anew in each call cannot go with it. R is as large as
    the layer's output, and is kept for every layer and guidance branch; it is stored in the model's dtype, since what
    is added to an output of that dtype needs no more digits. rho, one number a query and head, stays in float32,
    because it is a difference of LSEs.

    Args:
        period: steps from one full step to the next (published: 5).
        growth: what rho gains a step (published: .04), because attention spreads as the noise goes.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "rettention"
    lse: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    period: int = 5
    growth: float = 0.04

    def __post_init__(self) -> None:
        check_count(self.name, "period", self.period)
        number = isinstance(self.growth, int | float) and not isinstance(self.growth, bool)
        if not number or not 0 <= self.growth <= 1:
            raise ConfigError(f"{self.name}: growth is {self.growth!r}; give a number from 0 to 1")

    def attend(self, call: Call) -> torch.Tensor:
        """Full attention at a full step, else the kernel's output with what was left behind.

        Raises:
            ConfigError: if the pattern has sorted the tokens in another way since the full step.
        """
        found, heads = call.memory, call.heads
        # a step that comes again, or an earlier one, is a full step again
        since = heads.step - found["step"] if _fits(found, call) else 0
        if not 0 < since < self.period:
            return self._full(call)
        if not _same_order(found["order"], heads.order):
            raise ConfigError(
                f"{self.name} adds what an earlier step left at each place, but the pattern sorts the tokens anew in"
                " each call; give it a pattern with one order of the tokens, or another compensation"
            )
        out = call.run(found["mask"])
        call.add_pairs(found["share"])
        rho = found["rho"] + found["grows"] * (self.growth * (since - 1))
        rho = rho.transpose(1, 2).unsqueeze(-1)
        return (wide(out) * rho + wide(found["rest"])).to(out.dtype)

    @staticmethod
    def _full(call: Call) -> torch.Tensor:
        sparse, sparse_lse = call.sparse_with_lse()
        full, full_lse = call.full_with_lse()
        layout = call.heads.layout
        grows = skipping_blocks(call)[..., layout.block_of_token.to(full.device)]
        # rows that skip nothing, such as text's, stay as the kernel makes them
        rho = torch.where(grows, (sparse_lse - full_lse).exp(), 1.0)
        rest = wide(full) - wide(sparse) * rho.transpose(1, 2).unsqueeze(-1)
        rest = torch.where(grows.transpose(1, 2).unsqueeze(-1), rest, 0.0).to(full.dtype)
        call.memory.update(
            step=call.heads.step, layout=layout, order=call.heads.order, mask=call.mask, share=call.share, rho=rho,
            rest=rest, grows=grows,
        )  # fmt: skip
        return full


def _same_order(before: HeadOrder | None, now: HeadOrder | None) -> bool:
    if before is None or now is None:
        return before is now
    return before is now or torch.equal(before.q, now.q)


def _fits(found: dict[str, Any], call: Call) -> bool:
    """Whether something was left behind, for samples of this number and tokens of this order."""
    if "rest" not in found:
        return False
    rest, q = found["rest"], call.heads.q
    return found["layout"] == call.heads.layout and rest.shape == q.shape and rest.device == q.device
