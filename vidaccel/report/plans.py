"""A plan in words and numbers: its facts, its rules with densities, and the panels of its heat-map."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from ..configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from ..errors import ConfigError
from ..layout import TokenLayout
from ..patterns.registry import build_pattern

__all__ = ["describe_patterns", "heatmap_panels", "plan_facts", "rule_row", "shown_extent"]


def plan_facts(plan: Plan, layout: TokenLayout) -> list[tuple[str, str]]:
    """(name, text) of everything about a plan but its rules, and of the layout its densities are shown for."""
    made_for = "any model"
    if plan.fingerprint is not None:
        fields = {key: value for key, value in plan.fingerprint.to_data().items() if value not in (None, {}, [])}
        made_for = ", ".join(f"{name} {value}" for name, value in fields.items())
    tile = "chosen by the layout" if plan.tile is None else str(plan.tile)
    shown = f"{layout.grid} tokens in {layout.tile_shape} tiles, {layout.num_blocks} blocks"
    facts = [*plan.provenance, ("made for", made_for), ("tile", tile), *_linear_facts(plan)]
    facts += [] if plan.cache is None else [("step cache", plan.cache)]
    return [*facts, ("densities shown for", shown)]


def _linear_facts(plan: Plan) -> list[tuple[str, str]]:
    """Which Linears are computed in how many bits, a rule a line."""
    lines = []
    for rule in () if plan.linear is None else plan.linear.rules:
        where = "every layer" if rule.layers is None else f"layers {_ranges(rule.layers)}"
        what = "every Linear of attention and feed-forward" if rule.modules is None else ", ".join(rule.modules)
        lines.append(f"{rule.precision}: {what} in {where} of {rule.transformer or 'any transformer'}")
    return [("linear", "\n".join(lines))] if lines else []


def rule_row(rule: Rule, layout: TokenLayout) -> tuple[str, str, str, str, str, str]:
    """Noise level, transformer, layers, branch, policy and mean density of one rule, as texts."""
    low, high = rule.noise
    heads = rule.policy.heads
    kinds = Counter(str(head) for head in heads)
    density = sum(_density(head, layout) for head in heads) / len(heads)  # NaN if one depends on the input
    return (
        f"{low:g} to {high:g}",
        rule.transformer or "any",
        "all" if rule.layers is None else _ranges(rule.layers),
        rule.branch or "both",
        "\n".join(kind if len(heads) == 1 else f"{count} heads: {kind}" for kind, count in kinds.items()),
        "varies" if math.isnan(density) else f"{density:.3f}",
    )


def describe_patterns(plan: Plan, layout: TokenLayout) -> list[str]:
    """One line for each sparse pattern of the plan, as it comes out on this layout."""
    specs = {head.pattern: None for rule in plan.rules for head in rule.policy.heads}
    return [build_pattern(spec).describe(layout) for spec in specs if spec.name != "dense"]


def shown_extent(plan: Plan, layers: int | None, heads: int | None) -> tuple[int, int, str]:
    """How many layers and heads a heat-map shows, and a note on those that are like the last one shown.

    Args:
        layers, heads: as the user wants it; ``None`` = the model's, else as many as the rules tell apart.

    Raises:
        ConfigError: the plan has a policy per head, for another number of heads.
    """
    made = plan.fingerprint
    per_head = max((len(rule.policy.heads) for rule in plan.rules), default=1)
    if heads is not None and per_head not in (1, heads):
        raise ConfigError(f"--heads is {heads}, but the plan has policies for {per_head} heads; leave it out")
    notes = []
    if layers is None:
        layers = made.layers if made else None
    if layers is None:
        layers = max((layer for rule in plan.rules for layer in rule.layers or ()), default=-1) + 2
        notes.append(f"layer {layers - 1} stands for all further ones")
    if heads is None:
        heads = made.heads if made else None
    if heads is None:
        heads = per_head
        if per_head == 1:
            notes.append("head 0 stands for all")
    return layers, heads, "; ".join(notes)


def heatmap_panels(plan: Plan, layout: TokenLayout, layers: int, heads: int) -> list[tuple[str, NDArray[np.float64]]]:
    """(title, densities [layers, heads]) of every noise bin, transformer and branch that the rules tell apart.

    Noise bins come as a generation runs through them, from pure noise on.
    """
    transformers = sorted({rule.transformer for rule in plan.rules if rule.transformer}) or ["transformer"]
    branches: list[str | None] = [*sorted({rule.branch for rule in plan.rules if rule.branch})]
    bins = list(pairwise(plan.noise_edges()))[::-1]
    known: dict[LayerPolicy, list[float]] = {}
    panels = []
    for (low, high), transformer, branch in product(bins, transformers, branches or [None]):
        table = np.empty((layers, heads))
        for layer in range(layers):
            policy = plan.lookup((low + high) / 2, transformer, layer, branch)
            if policy not in known:
                known[policy] = [_density(head, layout) for head in policy.heads]
            table[layer] = known[policy]
        parts = [f"noise {low:g} to {high:g}"]
        parts += [transformer] if len(transformers) > 1 else []
        parts += [branch] if branch is not None else []
        panels.append((", ".join(parts), table))
    return panels


def _density(head: HeadPolicy, layout: TokenLayout) -> float:
    """The pattern's density on this layout; NaN where only a run tells."""
    density = build_pattern(head.pattern).density(layout)
    return math.nan if density is None else density


def _ranges(numbers: tuple[int, ...]) -> str:
    """ "0-3, 7" for (0, 1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
