"""A patched attention layer, and one call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from ..errors import StrictError
from ..patterns.dynamic import Heads
from .context import ForwardContext, PatchedTransformer
from .guard import HeadWatch
from .prepare import HeadShare
from .runs import Moment
from .sequence import Sequence
from .stats import LayerStats

if TYPE_CHECKING:
    from .session import Session

__all__ = ["AttentionSite", "DenseAttention", "LayerCall", "Observer"]

#: ``dense(q, k, v, mask) -> out``, all [B, S, H, D]: what the unpatched layer would have run.
DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Observer(Protocol):
    """Looks on while layers run dense; calibration is one."""

    def wants(self, call: LayerCall) -> bool:
        """Whether to show this call, which has just run dense, to :meth:`observe`."""

    def observe(self, call: LayerCall, heads: Heads, out: torch.Tensor) -> None:
        """Sees all heads of some samples and their dense output [B,S,H,D], in layout order, without padding."""


@dataclass(eq=False)
class AttentionSite:
    """One patched attention layer: where it is, what it ran before, and its statistics. Nothing here is of one pass."""

    session: Session
    transformer: PatchedTransformer
    layer: int
    dense: DenseAttention
    stats: LayerStats
    #: The layer's trained tensors by name, on a device; the patcher keeps them where offloading finds them.
    weights: Callable[[torch.device], Mapping[str, torch.Tensor]] = field(default=lambda device: {})
    #: The same as ``dense`` for a call with all tokens of some heads, where ``dense`` exchanges tokens between ranks.
    dense_alone: DenseAttention | None = None

    def fell_back(self, reason: str) -> None:
        """Counts a call that does not run as planned, or raises in a strict session.

        Raises:
            StrictError: in a strict session.
        """
        if self.session.strict:
            raise StrictError(
                f"{self.transformer.name} layer {self.layer} cannot run as the plan says: {reason};"
                " patch with strict=False to let it run otherwise and have that reported"
            )
        self.stats.count_fallback(reason)


@dataclass(eq=False)
class LayerCall:
    """One attention call of a layer.

    Args:
        site: the layer.
        context: the forward pass that the call is in.
        share: the heads that it has, if they are not all of the layer's.
    """

    site: AttentionSite
    context: ForwardContext
    share: HeadShare | None = None

    @property
    def moment(self) -> Moment:
        """Where the pass stands in its run."""
        return self.context.moment

    @property
    def first_head(self) -> int:
        """Number in the layer of the call's first head."""
        return 0 if self.share is None else self.share.first

    @property
    def watch(self) -> HeadWatch:
        """What the guard found in this layer in the run."""
        return self.context.run.head_watches.setdefault(self.site, HeadWatch())

    def memory(self, of: Any) -> dict[str, Any]:
        """What the pattern of these heads remembers of the calls before, in this stream of passes of this run."""
        return self.context.run.memory(self.site, (of, self.moment.stream))

    def heads(
        self,
        sequence: Sequence,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> Heads:
        """All heads of the call, from q, k, v [B,S,H,D] and the input [B,S,C] in layout order."""
        site, moment = self.site, self.moment
        return Heads(
            q, k, v, sequence.layout(q.device), noise_level=moment.noise_level, step=moment.step,
            transformer=site.transformer.name, layer=site.layer, weights=site.weights(q.device), hidden=hidden,
            curvature=self.context.run.curvature(site.transformer.name, moment).value,
            members=() if self.share is None else tuple(self.share.numbers),
        )  # fmt: skip

    def run_dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What the unpatched layer runs. Token order does not matter to it, unless the model's mask has one."""
        site, context = self.site, self.context
        dense = site.dense if self.share is None or site.dense_alone is None else site.dense_alone
        mask = over_all_tokens(mask, q.shape[1])
        if mask is None or not context.tiled or not isinstance(context.parts(q, mask), str):
            return dense(q, k, v, mask)
        sequence = context.sequence(q.shape[1])
        assert isinstance(sequence, Sequence)  # tiled only if the sequence is known
        layout = sequence.layout(q.device)
        return layout.tile(dense(layout.untile(q), layout.untile(k), layout.untile(v), mask))


def over_all_tokens(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """A mask as attention functions take it: one of the last tokens only, [B, n], becomes [B, 1, 1, S]."""
    if mask is None or mask.dim() != 2:
        return mask
    return F.pad(mask.bool(), (tokens - mask.shape[1], 0), value=True)[:, None, None]
