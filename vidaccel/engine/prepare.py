"""From a layer's policy to what a kernel takes: heads grouped by precision and tail, one block mask a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blockmask import BlockMask
from ..configs.plan import LayerPolicy
from ..layout import TokenLayout
from ..patterns.registry import build_pattern
from ..types import PRECISIONS, Precision

__all__ = ["HeadGroup", "prepare"]


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of one layer that run in one kernel call.

    Args:
        heads: int64 [n] on the layout's device, or ``None`` for all heads of the layer.
        mask: blocks they attend, [1, 1 or n, NB, NB].
        precision: how QK^T and PV are computed.
        tail: whether skipped blocks are summarised by their means.
        share: part of the layer's heads that are in this group.
        density: kept token pairs over all, mean over the group's heads.
    """

    heads: torch.Tensor | None
    mask: BlockMask
    precision: Precision
    tail: bool
    share: float
    density: float


def prepare(policy: LayerPolicy, num_heads: int, layout: TokenLayout) -> tuple[HeadGroup, ...]:
    """Kernel calls that carry out ``policy`` on a layer of ``num_heads`` heads; empty if all of it is plain dense.

    Raises:
        ConfigError: if the policy names a pattern or parameter that does not exist, or has another number of heads.
    """
    policy.check_heads(num_heads)
    members: dict[tuple[str, bool], list[int]] = {}
    for head in range(num_heads):
        choice = policy.for_head(head, num_heads)
        members.setdefault((choice.precision, choice.compensation == "pooled_tail"), []).append(head)

    groups = []
    for (precision, tail), heads in members.items():
        specs = [policy.for_head(head, num_heads).pattern for head in heads]
        distinct = {spec: build_pattern(spec).blocks(layout).to(layout.device) for spec in dict.fromkeys(specs)}
        if len(distinct) == 1:  # one list for all heads: kernels share the index work
            mask = BlockMask.from_dense(distinct[specs[0]])
        else:
            mask = BlockMask.from_dense(torch.stack([distinct[spec] for spec in specs]))
        groups.append(
            HeadGroup(
                heads=None if len(heads) == num_heads else torch.tensor(heads, device=layout.device),
                mask=mask,
                # nothing is skipped under a full mask, so there is no tail to add
                tail=tail and not mask.is_full(),
                precision=PRECISIONS[precision],
                share=len(heads) / num_heads,
                density=mask.density(layout),
            )
        )
    if all(g.mask.is_full() and not g.precision.quantised for g in groups):
        return ()
    return tuple(groups)
