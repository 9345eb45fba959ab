"""What every compensation is: a rule that makes up for the blocks a sparse kernel skipped, and what it may ask for.

A :class:`Call` is one kernel call of some heads. A compensation runs the kernel as often as it needs, with the
log-sum-exp if it merges partial results, and returns the layer's output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from ..blockmask import BlockMask
from ..patterns.dynamic import Heads
from ..variablemask import VariableBlockMask

__all__ = ["Call", "Compensation"]

#: ``run(mask, tail=..., return_lse=...)``: the group's kernel on the call's q, k and v.
_Run = Callable[..., Any]


@dataclass(eq=False)
class Call:
    """Some heads of one attention call, the blocks that are kept, and the kernel to run.

    Args:
        heads: q, k, v [B,S,H,D] in layout order, block means, noise level, step, trained weights.
        mask: blocks that the pattern keeps, [1 or B, 1 or H, NB, NB]; of variable size only where the compensation says
            that any blocks will do.
        share: token pairs in them over all pairs.
        run: the kernel, see :data:`_Run`.
        memory: whatever the compensation wants to find again in the next call of the same layer, heads and guidance
            branch; not shared with the pattern. Empty at the start of each generation.
    """

    heads: Heads
    mask: BlockMask | VariableBlockMask
    share: float
    run: _Run
    memory: dict[str, Any] = field(default_factory=dict)
    _pairs: float = 0.0

    def sparse(self, *, tail: bool = False) -> torch.Tensor:
        """Attention over the kept blocks, [B,S,H,D]; with ``tail`` the means of the others stand in for them."""
        self._pairs += self.share
        return self.run(self.mask, tail=tail)  # type: ignore[no-any-return]

    def sparse_with_lse(self, *, tail: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The same and its log-sum-exp, float32 [B,H,S]."""
        self._pairs += self.share
        return self.run(self.mask, tail=tail, return_lse=True)  # type: ignore[no-any-return]

    def full_with_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over all blocks, and its log-sum-exp."""
        self._pairs += 1.0
        everything = BlockMask.full(self.heads.layout).to(self.heads.q.device)
        return self.run(everything, return_lse=True)  # type: ignore[no-any-return]

    def add_pairs(self, share: float) -> None:
        """Counts token pairs that the compensation computed without the kernel, as a share of all pairs."""
        self._pairs += share

    @property
    def density(self) -> float:
        """Token pairs that this call computed over all pairs: above 1 where it computed pairs twice."""
        return self._pairs

    @property
    def blocks(self) -> BlockMask:
        """The mask of a compensation that does not take any blocks."""
        assert isinstance(self.mask, BlockMask), "this compensation does not say that any blocks will do"
        return self.mask

    @cached_property
    def kept(self) -> torch.Tensor:
        """The kept blocks, bool [1 or B, 1 or H, NB, NB] on the device of q."""
        return self.blocks.dense.to(self.heads.q.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Compensation(ABC):
    """A rule that turns the output over kept blocks into one that stands for all.

    A subclass is a frozen dataclass, made with ``eq=False``; it gives :attr:`name` and :meth:`attend`. It keeps no
    state in itself: what it wants to find again goes to ``call.memory``. Text tokens see every key, so their rows must
    come out as the kernel made them.
    """

    name: ClassVar[str]
    #: Whether the kernel is asked for its pooled tail, and for the log-sum-exp: what a kernel must be able to do.
    tail: ClassVar[bool] = False
    lse: ClassVar[bool] = False
    #: Whether the result depends on earlier calls.
    stateful: ClassVar[bool] = False
    #: Whether it leaves blocks to the kernel, so that heads may have blocks of their own.
    any_blocks: ClassVar[bool] = False
    #: Whether it changes the output even where no block is skipped.
    always: ClassVar[bool] = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compensation) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def trained(self) -> tuple[str, ...]:
        """Groups of trained tensors that it takes from ``heads.weights``, see :mod:`vidaccel.configs.weights`."""
        return ()

    @property
    def neutral(self) -> bool:
        """Whether it does without them: its output is then that of the kept blocks alone."""
        return False

    @property
    def needs_hidden(self) -> bool:
        """Whether it takes ``heads.hidden`` where it has its trained tensors."""
        return False

    @abstractmethod
    def attend(self, call: Call) -> torch.Tensor:
        """The output [B,S,H,D] in the dtype of q."""
