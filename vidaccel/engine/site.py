"""One patched attention layer: where it is, what it ran before, what it remembers and what became of its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from ..errors import StrictError
from ..patterns.dynamic import Heads
from .guard import HeadWatch
from .prepare import HeadShare
from .sequence import Sequence
from .stats import LayerStats

if TYPE_CHECKING:
    from .session import Session, TransformerState

__all__ = ["AttentionSite", "DenseAttention", "Observer"]

#: ``dense(q, k, v, mask) -> out``, all [B, S, H, D]: what the unpatched layer would have run.
DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Observer(Protocol):
    """Looks on while layers run dense; calibration is one."""

    def wants(self, site: AttentionSite) -> bool:
        """Whether to show this call, which has just run dense, to :meth:`observe`."""

    def observe(self, site: AttentionSite, heads: Heads, out: torch.Tensor) -> None:
        """Sees all heads of some samples and their dense output [B,S,H,D], in layout order, without padding."""


@dataclass(eq=False)
class AttentionSite:
    """One patched attention layer: where it is, what it ran before, and its statistics."""

    session: Session
    state: TransformerState
    layer: int
    dense: DenseAttention
    stats: LayerStats
    memories: dict[Any, dict[str, Any]] = field(default_factory=dict)
    #: Number of the run that the memories are of.
    remembered: int | None = None
    #: The layer's trained tensors by name, on a device; the patcher keeps them where offloading finds them.
    weights: Callable[[torch.device], Mapping[str, torch.Tensor]] = field(default=lambda device: {})
    watch: HeadWatch = field(default_factory=HeadWatch)
    #: The same as ``dense`` for a call with all tokens of some heads, where ``dense`` exchanges tokens between ranks.
    dense_alone: DenseAttention | None = None
    #: The heads of the call that runs now, if it has not all of the layer's.
    share: HeadShare | None = None

    @property
    def first_head(self) -> int:
        """Number in the layer of the call's first head."""
        return 0 if self.share is None else self.share.first

    def memory(self, of: Any) -> dict[str, Any]:
        """What the pattern of these heads and this guidance branch remembers of the run; empty in a new run."""
        moment = self.state.moment
        assert moment is not None
        if self.remembered != moment.run:  # what another run left behind may be large
            self.memories.clear()
            self.remembered = moment.run
        return self.memories.setdefault((of, moment.branch), {})

    def heads(
        self,
        sequence: Sequence,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> Heads:
        """All heads of a call at this moment, from q, k, v [B,S,H,D] and the input [B,S,C] in layout order."""
        moment = self.state.moment
        assert moment is not None  # or the call would run dense
        return Heads(
            q, k, v, sequence.layout(q.device), noise_level=moment.noise_level, step=moment.step,
            transformer=self.state.name, layer=self.layer, weights=self.weights(q.device), hidden=hidden,
            curvature=self.state.trajectory.curvature(moment),
            members=() if self.share is None else tuple(self.share.numbers),
        )  # fmt: skip

    def run_dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What the unpatched layer runs. Token order does not matter to it, unless the model's mask has one."""
        state = self.state
        dense = self.dense if self.share is None or self.dense_alone is None else self.dense_alone
        if mask is not None and mask.dim() == 2:  # of the last tokens only; attention functions take one over all
            mask = F.pad(mask.bool(), (q.shape[1] - mask.shape[1], 0), value=True)[:, None, None]
        if mask is None or not state.tiled or not isinstance(state.parts(q, mask), str):
            return dense(q, k, v, mask)
        sequence = state.sequence(q.shape[1])
        assert isinstance(sequence, Sequence)  # tiled only if the sequence is known
        layout = sequence.layout(q.device)
        return layout.tile(dense(layout.untile(q), layout.untile(k), layout.untile(v), mask))

    def fell_back(self, reason: str) -> None:
        """Counts a call that does not run as planned, or raises in a strict session."""
        if self.session.strict:
            raise StrictError(
                f"{self.state.name} layer {self.layer} cannot run as the plan says: {reason};"
                " patch with strict=False to let it run otherwise and have that reported"
            )
        self.stats.fallbacks[reason] += 1
