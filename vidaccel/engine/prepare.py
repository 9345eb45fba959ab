"""From a layer's policy to what a kernel takes: heads in groups of one kernel call each.

Static patterns of one precision and tail share a group, since their block masks are stacked. A dynamic pattern has a
group of its own; its mask is chosen in each call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blockmask import BlockMask
from ..configs.pattern_spec import PatternSpec
from ..configs.plan import LayerPolicy
from ..layout import TokenLayout
from ..patterns.dynamic import DynamicPattern
from ..patterns.registry import build_pattern, build_static, pattern_class
from ..types import PRECISIONS, Precision

__all__ = ["HeadGroup", "prepare"]


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of one layer that run in one kernel call.

    Args:
        heads: int64 [n] on the layout's device, or ``None`` for all heads of the layer.
        mask: blocks they attend, [1, 1 or n, NB, NB]; ``None`` if the pattern chooses them in each call.
        pattern: that pattern, or ``None``.
        precision: how QK^T and PV are computed.
        tail: whether skipped blocks are summarised by their means.
        members: numbers of those heads in the layer.
        share: part of the layer's heads that are in this group.
        density: kept token pairs over all, mean over the group's heads; ``None`` where each call has its own.
    """

    heads: torch.Tensor | None
    mask: BlockMask | None
    pattern: DynamicPattern | None
    precision: Precision
    tail: bool
    members: tuple[int, ...]
    share: float
    density: float | None


def prepare(policy: LayerPolicy, num_heads: int, layout: TokenLayout) -> tuple[HeadGroup, ...]:
    """Kernel calls that carry out ``policy`` on a layer of ``num_heads`` heads; empty if all of it is plain dense.

    Raises:
        ConfigError: if the policy names a pattern or parameter that does not exist, or has another number of heads.
    """
    policy.check_heads(num_heads)
    members: dict[tuple[str, bool, PatternSpec | None], list[int]] = {}
    for head in range(num_heads):
        choice = policy.for_head(head, num_heads)
        chosen = choice.pattern if pattern_class(choice.pattern).dynamic else None
        members.setdefault((choice.precision, choice.compensation == "pooled_tail", chosen), []).append(head)

    groups = []
    for (precision, tail, chosen), heads in members.items():
        pattern = None if chosen is None else build_pattern(chosen)
        assert pattern is None or isinstance(pattern, DynamicPattern)
        mask = None
        if pattern is None:
            mask = _static_mask([policy.for_head(head, num_heads).pattern for head in heads], layout)
        groups.append(
            HeadGroup(
                heads=None if len(heads) == num_heads else torch.tensor(heads, device=layout.device),
                mask=mask,
                pattern=pattern,
                # nothing is skipped under a full mask, so there is no tail to add
                tail=tail and (mask is None or not mask.is_full()),
                precision=PRECISIONS[precision],
                members=tuple(heads),
                share=len(heads) / num_heads,
                density=None if mask is None else mask.density(layout),
            )
        )
    if all(g.mask is not None and g.mask.is_full() and not g.precision.quantised for g in groups):
        return ()
    return tuple(groups)


def _static_mask(specs: list[PatternSpec], layout: TokenLayout) -> BlockMask:
    """The masks of these heads, stacked; one for all if they are alike, because then kernels share the index work."""
    distinct = {}
    for spec in dict.fromkeys(specs):
        distinct[spec] = build_static(spec).blocks(layout).to(layout.device)
    if len(distinct) == 1:
        return BlockMask.from_dense(distinct[specs[0]])
    return BlockMask.from_dense(torch.stack([distinct[spec] for spec in specs]))
