"""What runs how: the plan, from whole pipeline down to one attention head.

::

    Plan ── rules, the first that matches decides; nothing matches = dense
    └── Rule ── where it applies: noise levels, transformer, layers, cfg branch
        └── LayerPolicy ── one HeadPolicy for all heads, or one for each
            └── HeadPolicy ── PatternSpec + precision + CompensationSpec + skip

Everything here is frozen, hashable and validated when it is made. Plans know *names* of patterns and compensations
only; whether there is one of that name is the business of ``vidaccel.patterns`` and ``vidaccel.compensation``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..types import PRECISIONS, TRANSFORMERS, TileShape
from .fingerprint import Fingerprint
from .linear import LinearPlan
from .pattern_spec import CompensationSpec, PatternSpec
from .step_cache import plan_cache

__all__ = [
    "BRANCHES",
    "TRANSFORMERS",
    "CompensationSpec",
    "Fingerprint",
    "HeadPolicy",
    "LayerPolicy",
    "PatternSpec",
    "Plan",
    "Rule",
]

#: The two passes of classifier-free guidance.
BRANCHES = ("cond", "uncond")

_DENSE = PatternSpec("dense")
_NONE = CompensationSpec("none")
_MAX_LAYER = 65_535
_NOISE_SLACK = 0.01  # rounding of a scheduler's sigmas, far below the distance between two steps


def _one_of(field: str, found: str, valid: tuple[str, ...]) -> None:
    if found not in valid:
        raise ConfigError(f"{field} is {found!r}; valid are {', '.join(valid)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _noise_bounds(noise: tuple[float, float]) -> tuple[float, float]:
    bounds = tuple(noise) if isinstance(noise, tuple | list) else ()
    if len(bounds) != 2 or not all(_is_number(bound) for bound in bounds):
        raise ConfigError(f"Rule.noise is {noise!r}; give two numbers, low and high, in [0, 1]")
    low, high = float(bounds[0]), float(bounds[1])
    if not 0.0 <= low < high <= 1.0:
        raise ConfigError(f"Rule.noise is ({low}, {high}); valid is 0 <= low < high <= 1, where 1 is pure noise")
    return low + 0.0, high  # + 0.0 turns -0.0 into 0.0, so that equal rules print and hash alike


def _layer_numbers(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(layers, tuple | list | range | set | frozenset):
        raise ConfigError(f"Rule.layers is {layers!r}; give a tuple of layer numbers, or None for all layers")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= _MAX_LAYER:
            raise ConfigError(f"Rule.layers holds {layer!r}; layers are whole numbers from 0 to {_MAX_LAYER}")
    if not layers:
        raise ConfigError("Rule.layers is empty, so the rule would never apply; give layers, or None for all")
    return tuple(sorted(set(layers)))


def _noise_level(level: float) -> float:
    if not -_NOISE_SLACK <= level <= 1.0 + _NOISE_SLACK:  # also catches NaN
        raise ConfigError(f"the noise level is {level!r}; valid is 0 (clean) to 1 (pure noise), not a raw timestep")
    return min(1.0, max(0.0, float(level)))


@dataclass(frozen=True)
class HeadPolicy:
    """How one attention head is computed.

    Args:
        pattern: which key blocks each query block attends.
        precision: a name from :data:`vidaccel.types.PRECISIONS`.
        compensation: what makes up for skipped blocks; a bare name stands for a spec without parameters.
        skip: BLASST's scale factor: in a sequence of L tokens, the kernel passes over key blocks whose largest weight
            is below ``skip / L`` of the largest so far; 0 never does.

    Raises:
        ConfigError: for an unknown precision, a field of the wrong kind, or compensation where nothing is skipped.
    """

    pattern: PatternSpec = _DENSE
    precision: str = "native"
    compensation: CompensationSpec = _NONE
    skip: float = 0.0

    if TYPE_CHECKING:

        def __init__(
            self,
            pattern: PatternSpec = ...,
            precision: str = ...,
            compensation: CompensationSpec | str = ...,
            skip: float = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, PatternSpec):
            raise ConfigError(f"HeadPolicy.pattern is {self.pattern!r}; give PatternSpec.make(name, ...)")
        _one_of("HeadPolicy.precision", self.precision, tuple(PRECISIONS))
        if isinstance(self.compensation, str):
            object.__setattr__(self, "compensation", CompensationSpec(self.compensation))
        if not isinstance(self.compensation, CompensationSpec):
            raise ConfigError(
                f"HeadPolicy.compensation is {self.compensation!r}; give a name or CompensationSpec.make(name, ...)"
            )
        if not _is_number(self.skip) or self.skip < 0:
            raise ConfigError(f"HeadPolicy.skip is {self.skip!r}; give a scale factor of at least 0, 0 for no skipping")
        object.__setattr__(self, "skip", float(self.skip) + 0.0)
        if self.pattern.name == "dense" and self.compensation != _NONE:
            raise ConfigError(
                f"compensation {str(self.compensation)!r} repairs skipped blocks, but the dense pattern skips none;"
                " set compensation to 'none' or choose a sparse pattern"
            )

    def __str__(self) -> str:
        precision = "" if self.precision == "native" else f" {self.precision}"
        compensation = "" if self.compensation == _NONE else f" + {self.compensation}"
        skip = f", skip {self.skip:g}" if self.skip else ""
        return f"{self.pattern}{precision}{compensation}{skip}"

    @property
    def tail(self) -> bool:
        """Whether the kernel itself summarises skipped blocks by their means."""
        return self.compensation.name == "pooled_tail"

    @property
    def is_dense(self) -> bool:
        """Whether this is plain full attention, so that the model's own code may run."""
        return self.pattern.name == "dense" and self.precision == "native" and not self.skip


_DENSE_HEAD = HeadPolicy()


@dataclass(frozen=True)
class LayerPolicy:
    """How the heads of one attention layer are computed.

    Args:
        heads: one policy for every head alike, or one for each head in order.

    Raises:
        ConfigError: if ``heads`` is empty or holds something else than policies.
    """

    heads: tuple[HeadPolicy, ...] = (_DENSE_HEAD,)

    def __post_init__(self) -> None:
        if isinstance(self.heads, HeadPolicy):
            raise ConfigError("LayerPolicy.heads is a single HeadPolicy; give a tuple: LayerPolicy((policy,))")
        object.__setattr__(self, "heads", tuple(self.heads))
        if not self.heads:
            raise ConfigError("LayerPolicy.heads is empty; give one HeadPolicy for all heads or one for each")
        for head in self.heads:
            if not isinstance(head, HeadPolicy):
                raise ConfigError(f"LayerPolicy.heads holds {head!r}; every entry must be a HeadPolicy")

    @property
    def is_dense(self) -> bool:
        """Whether every head is plain full attention."""
        return all(head.is_dense for head in self.heads)

    @property
    def is_uniform(self) -> bool:
        """Whether all heads have the same policy."""
        return len(set(self.heads)) == 1

    def check_heads(self, num_heads: int) -> None:
        """Raises :class:`ConfigError` unless the policy fits a layer of ``num_heads`` heads."""
        if len(self.heads) not in (1, num_heads):
            raise ConfigError(
                f"the policy has {len(self.heads)} head entries, but the layer has {num_heads} heads;"
                f" give 1 entry for all heads, or {num_heads}"
            )

    def for_head(self, index: int, num_heads: int) -> HeadPolicy:
        """The policy of head ``index`` in a layer of ``num_heads`` heads."""
        self.check_heads(num_heads)
        if not 0 <= index < num_heads:
            raise ConfigError(f"head {index} does not exist; the layer has heads 0 to {num_heads - 1}")
        return self.heads[0 if len(self.heads) == 1 else index]


@dataclass(frozen=True)
class Rule:
    """A policy and where it applies; a condition that is ``None`` always holds.

    Args:
        policy: what to do there.
        noise: normalised noise levels ``(low, high]``; a ``low`` of 0 includes 0 itself. 1 is pure noise.
        transformer: one of :data:`TRANSFORMERS`.
        layers: numbers of the layers, counted from 0; kept sorted and without repeats.
        branch: one of :data:`BRANCHES`.

    Raises:
        ConfigError: for bounds outside [0, 1] or in the wrong order, an unknown name, or a layer below 0.
    """

    policy: LayerPolicy
    noise: tuple[float, float] = (0.0, 1.0)
    transformer: str | None = None
    layers: tuple[int, ...] | None = None
    branch: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, LayerPolicy):
            raise ConfigError(f"Rule.policy is {self.policy!r}; give a LayerPolicy")
        object.__setattr__(self, "noise", _noise_bounds(self.noise))
        if self.transformer is not None:
            _one_of("Rule.transformer", self.transformer, TRANSFORMERS)
        if self.branch is not None:
            _one_of("Rule.branch", self.branch, BRANCHES)
        if self.layers is not None:
            object.__setattr__(self, "layers", _layer_numbers(self.layers))

    @property
    def is_unconditional(self) -> bool:
        """Whether the rule applies everywhere, so that no later rule is ever asked."""
        return self.noise == (0.0, 1.0) and self.transformer is None and self.layers is None and self.branch is None

    def matches(self, noise_level: float, transformer: str, layer: int, branch: str | None) -> bool:
        """Whether the rule applies there. A rule for one branch does not apply to a batch of both (``None``)."""
        low, high = self.noise
        return (
            (low < noise_level <= high or noise_level == low == 0.0)
            and (self.transformer is None or self.transformer == transformer)
            and (self.layers is None or layer in self.layers)
            and (self.branch is None or self.branch == branch)
        )


@dataclass(frozen=True)
class Plan:
    """What runs how in one pipeline. Calibration writes it, the runtime reads it.

    Args:
        name: what reports call it.
        rules: the first that matches decides; where none matches, attention is dense.
        tile: the tile shape the patterns were chosen for, or ``None`` for the one that wastes least.
        fingerprint: what the plan was made for, or ``None`` if it fits any model.
        provenance: (key, text) pairs on where the plan comes from; kept sorted.
        cache: a step cache of diffusers that runs beside the plan, as ``--cache`` takes it (``first-block:0.08``), or
            ``None``.
        linear: which Linear layers are computed in 8 bits, or ``None`` for none.

    Raises:
        ConfigError: if a field has the wrong type, or there is no such cache.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    tile: TileShape | None = None
    fingerprint: Fingerprint | None = None
    provenance: tuple[tuple[str, str], ...] = ()
    cache: str | None = None
    linear: LinearPlan | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"Plan.name is {self.name!r}; give a non-empty text")
        object.__setattr__(self, "rules", tuple(self.rules))
        for number, rule in enumerate(self.rules):
            if not isinstance(rule, Rule):
                raise ConfigError(f"rule {number} of plan {self.name!r} is {rule!r}; every entry must be a Rule")
        if self.tile is not None and not isinstance(self.tile, TileShape):
            raise ConfigError(f"Plan.tile is {self.tile!r}; give TileShape(frames, height, width) or None")
        if self.fingerprint is not None and not isinstance(self.fingerprint, Fingerprint):
            raise ConfigError(f"Plan.fingerprint is {self.fingerprint!r}; give a Fingerprint or None")
        pairs = dict(self.provenance)
        for key, text in pairs.items():
            if not isinstance(key, str) or not isinstance(text, str):
                raise ConfigError(f"Plan.provenance holds {key!r}: {text!r}; keys and values must be text")
        object.__setattr__(self, "provenance", tuple(sorted(pairs.items())))
        object.__setattr__(self, "cache", plan_cache(self.cache))
        if self.linear is not None and not isinstance(self.linear, LinearPlan):
            raise ConfigError(f"Plan.linear is {self.linear!r:.80}; give a LinearPlan or None")

    @staticmethod
    def dense() -> Plan:
        """Full attention everywhere."""
        return Plan("dense")

    @staticmethod
    def uniform(name: str, policy: HeadPolicy) -> Plan:
        """One policy for every head of every layer at every noise level."""
        return Plan(name, (Rule(LayerPolicy((policy,))),))

    @property
    def is_dense(self) -> bool:
        """Whether no rule that can be reached asks for anything but full attention."""
        for rule in self.rules:
            if not rule.policy.is_dense:
                return False
            if rule.is_unconditional:
                return True
        return True

    def noise_edges(self) -> tuple[float, ...]:
        """The distinct noise bounds of all rules in ascending order, 0 and 1 included."""
        return self._edges

    @cached_property
    def _edges(self) -> tuple[float, ...]:
        return tuple(sorted({0.0, 1.0, *(bound for rule in self.rules for bound in rule.noise)}))

    def noise_bin(self, noise_level: float) -> int:
        """Number of the bin ``(edges[i], edges[i + 1]]`` that holds the level; 0 is in bin 0.

        Two levels of one bin get the same policies, so a caller may remember :meth:`lookup` by bin.
        """
        return max(0, bisect_left(self._edges, _noise_level(noise_level)) - 1)

    def lookup(self, noise_level: float, transformer: str, layer: int, branch: str | None) -> LayerPolicy:
        """The policy of one layer in one forward pass.

        Args:
            noise_level: 1 is pure noise, 0 is none; a level off by rounding counts as the nearest in [0, 1].
            transformer: component name in the pipeline.
            layer: number of the layer, counted from 0.
            branch: ``"cond"``, ``"uncond"``, or ``None`` where both are in one batch or unknown.

        Raises:
            ConfigError: if the level is not normalised (a raw timestep such as 945, or NaN).
        """
        level = _noise_level(noise_level)
        for rule in self.rules:
            if rule.matches(level, transformer, layer, branch):
                return rule.policy
        return _DENSE_LAYER

    def with_provenance(self, **entries: str) -> Plan:
        """The same plan with these provenance entries added or replaced."""
        return replace(self, provenance=tuple({**dict(self.provenance), **entries}.items()))


_DENSE_LAYER = LayerPolicy()
