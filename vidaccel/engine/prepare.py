"""From a layer's policy to what a kernel takes: heads in groups of one kernel call each.

Static patterns of one precision, compensation and skip factor share a group, since their block masks are stacked. A
dynamic pattern has a group of its own; its mask is chosen in each call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blockmask import BlockMask
from ..compensation import Compensation, build_compensation
from ..configs.pattern_spec import CompensationSpec, PatternSpec
from ..configs.plan import HeadPolicy, LayerPolicy, Plan
from ..errors import ConfigError
from ..kernels.contract import KernelRequest
from ..layout import TokenLayout
from ..patterns.dynamic import DynamicPattern, Heads
from ..patterns.registry import build_pattern, build_static, pattern_class
from ..types import PRECISIONS, Precision

__all__ = [
    "HeadGroup",
    "HeadShare",
    "check_plan",
    "check_policy",
    "is_stateful",
    "needs_curvature",
    "prepare",
    "request_of",
]

_DROPPED = build_compensation(CompensationSpec("none"))


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of one layer that run in one kernel call.

    Args:
        heads: their places in the call, int64 [n] on the layout's device, or ``None`` for all heads of it.
        mask: blocks they attend, [1, 1 or n, NB, NB]; ``None`` if the pattern chooses them in each call.
        pattern: that pattern, or ``None``.
        precision: how QK^T and PV are computed.
        compensation: what makes up for skipped blocks.
        skip: BLASST's scale factor, see :class:`vidaccel.configs.plan.HeadPolicy`.
        members: numbers of those heads in the layer.
        key: what they do, by value: what they remember of a run is kept under it.
        share: part of the call's heads that are in this group.
        density: kept token pairs over all, mean over the group's heads; ``None`` where each call has its own.
    """

    heads: torch.Tensor | None
    mask: BlockMask | None
    pattern: DynamicPattern | None
    precision: Precision
    compensation: Compensation
    skip: float
    members: tuple[int, ...]
    key: tuple[object, ...]
    share: float
    density: float | None

    def request(self, q: torch.Tensor) -> KernelRequest:
        """What a kernel must be able to do to run the group on q [B,S,H,D]."""
        rule = self.compensation
        variable = self.pattern is not None and self.pattern.variable
        return KernelRequest.of(
            q, self.precision, tail=rule.tail, return_lse=rule.lse, skip=self.skip > 0, variable=variable
        )

    def of(self, heads: Heads) -> Heads:
        """The group's heads of all of a layer."""
        return heads if self.heads is None else heads.only(self.heads, self.members)


def request_of(policy: HeadPolicy, device: str, dtype: torch.dtype, head_dim: int) -> KernelRequest:
    """What a kernel must be able to do to run heads of ``head_dim`` channels by a policy.

    Args:
        device: its type.
    """
    rule, pattern = build_compensation(policy.compensation), build_pattern(policy.pattern)
    variable = isinstance(pattern, DynamicPattern) and pattern.variable
    return KernelRequest(
        device, dtype, head_dim, PRECISIONS[policy.precision], rule.tail, rule.lse, policy.skip > 0, variable
    )


@dataclass(frozen=True)
class HeadShare:
    """The heads of a layer that this process computes, where others compute the rest.

    Args:
        first: number of the first.
        count: how many; they follow each other.
        total: heads of the layer.
    """

    first: int
    count: int
    total: int

    @property
    def numbers(self) -> range:
        """Their numbers in the layer."""
        return range(self.first, self.first + self.count)


def check_plan(plan: Plan) -> None:
    """Raises :class:`ConfigError` if :func:`check_policy` does for something in the plan."""
    for policy in dict.fromkeys(head for rule in plan.rules for head in rule.policy.heads):
        check_policy(policy)


def check_policy(policy: HeadPolicy) -> None:
    """Raises :class:`ConfigError` if the policy names a pattern, compensation or parameter that does not exist.

    Or if a compensation that remembers outputs by place meets a pattern that sorts the tokens anew in each call, or
    blocks of variable size something that is made for the layout's.
    """
    pattern, rule = build_pattern(policy.pattern), build_compensation(policy.compensation)
    if not isinstance(pattern, DynamicPattern):
        return
    if rule.stateful and pattern.sorts_by_content:
        raise ConfigError(
            f"{policy.compensation} keeps outputs by place, but {policy.pattern.name} sorts the tokens anew in each"
            " call; give it a pattern with one order of the tokens, or another compensation"
        )
    if pattern.variable and not (rule.any_blocks and policy.precision == "native" and not policy.skip):
        raise ConfigError(
            f"{policy.pattern.name} in blocks of its own runs in the model's dtype, without skip, and with compensation"
            f" none or pooled_tail; found {policy.precision}, skip {policy.skip:g} and {policy.compensation}: set"
            " exact: false for blocks of one size"
        )


def is_stateful(policy: HeadPolicy) -> bool:
    """Whether what a policy does depends on earlier calls."""
    pattern = build_pattern(policy.pattern)
    remembers = isinstance(pattern, DynamicPattern) and pattern.stateful
    return remembers or build_compensation(policy.compensation).stateful


def needs_curvature(plan: Plan) -> bool:
    """Whether some pattern of the plan wants to know how the outputs of the transformer change."""
    built = (build_pattern(head.pattern) for rule in plan.rules for head in rule.policy.heads)
    return any(isinstance(pattern, DynamicPattern) and pattern.needs_curvature for pattern in built)


def prepare(
    policy: LayerPolicy, num_heads: int, layout: TokenLayout, share: HeadShare | None = None
) -> tuple[HeadGroup, ...]:
    """Kernel calls that carry out ``policy`` on a layer of ``num_heads`` heads; empty if all of it is plain dense.

    Args:
        share: those of them that a call has, ``None`` for all. Groups then count places and parts within the share;
            their members are numbers in the layer.

    Raises:
        ConfigError: if the policy names a pattern, compensation or parameter that does not exist, or has another number
            of heads.
    """
    policy.check_heads(num_heads)
    members: dict[tuple[str, CompensationSpec, float, PatternSpec | None], list[int]] = {}
    share = share or HeadShare(0, num_heads, num_heads)
    for head in share.numbers:
        choice = policy.for_head(head, num_heads)
        chosen = choice.pattern if pattern_class(choice.pattern).dynamic else None
        members.setdefault((choice.precision, choice.compensation, choice.skip, chosen), []).append(head)

    groups = []
    for (precision, compensation, skip, chosen), heads in members.items():
        pattern = None if chosen is None else build_pattern(chosen)
        assert pattern is None or isinstance(pattern, DynamicPattern)
        specs = [policy.for_head(head, num_heads).pattern for head in heads]
        mask = None if pattern is not None else _static_mask(specs, layout)
        rule = build_compensation(compensation)
        if mask is not None and mask.is_full() and not rule.always:
            rule = _DROPPED  # nothing is skipped
        groups.append(
            HeadGroup(
                heads=None if len(heads) == share.count else torch.tensor(heads, device=layout.device) - share.first,
                mask=mask,
                pattern=pattern,
                precision=PRECISIONS[precision],
                compensation=rule,
                skip=skip,
                members=tuple(heads),
                key=(tuple(specs), precision, compensation, skip, tuple(heads), layout),
                share=len(heads) / share.count,
                density=None if mask is None else mask.density(layout),
            )
        )
    if all(_plain(group) for group in groups):
        return ()
    return tuple(groups)


def _plain(group: HeadGroup) -> bool:
    """Whether the group is attention of everything to everything in the model's own dtype."""
    full = group.mask is not None and group.mask.is_full()
    return full and group.compensation == _DROPPED and not group.precision.quantised and not group.skip


def _static_mask(specs: list[PatternSpec], layout: TokenLayout) -> BlockMask:
    """The masks of these heads, stacked; one for all if they are alike, because then kernels share the index work."""
    distinct = {spec: build_static(spec).mask(layout) for spec in dict.fromkeys(specs)}
    if len(distinct) == 1:
        return distinct[specs[0]].to(layout.device)
    return BlockMask.stack([distinct[spec] for spec in specs], layout).to(layout.device)
