"""Which Linear layers are computed in 8 bits: plain data of a plan. What quantises them is ``vidaccel.linear``.

A weight has one precision for the whole generation, so noise levels and guidance branches have no say here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..types import TRANSFORMERS

__all__ = ["LINEAR_PRECISIONS", "LinearPlan", "LinearRule", "linear_from_data", "linear_plan", "linear_to_data"]

#: name -> how such a Linear is computed; ``native`` is the model's own way.
LINEAR_PRECISIONS: dict[str, str] = {
    "native": "as the model does it",
    "int8": "weights int8 with a scale for each output channel, inputs int8 with a scale for each token, sums in int32",
    "fp8": "weights and inputs float8_e4m3, with a scale for each output channel and each token",
}

_MAX_LAYER = 65_535
_MAX_RULES = 4096
_MAX_NAME = 200
_MODULE = re.compile(r"\w+(\.\w+)*\.\*(\.\w+)+", re.ASCII)
_KEYS = ("precision", "modules", "layers", "transformer")


@dataclass(frozen=True)
class LinearRule:
    """A precision and the Linears that get it; a condition that is ``None`` always holds.

    Args:
        precision: one of :data:`LINEAR_PRECISIONS`.
        modules: their paths in the transformer with a star for the layer's number, ``blocks.*.ffn.net.2``; kept sorted.
        layers: numbers of the layers within their stack of blocks, from 0; kept sorted.
        transformer: one of :data:`vidaccel.types.TRANSFORMERS`.

    Raises:
        ConfigError: for an unknown precision or transformer, or a path or layer of another form.
    """

    precision: str
    modules: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    transformer: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.precision, str) or self.precision not in LINEAR_PRECISIONS:
            raise ConfigError(
                f"LinearRule.precision is {_short(self.precision)}; valid are {', '.join(LINEAR_PRECISIONS)}"
            )
        if self.modules is not None:
            object.__setattr__(self, "modules", _names(self.modules))
        if self.layers is not None:
            object.__setattr__(self, "layers", _numbers(self.layers))
        if self.transformer is not None and self.transformer not in TRANSFORMERS:
            raise ConfigError(
                f"LinearRule.transformer is {_short(self.transformer)}; valid are {', '.join(TRANSFORMERS)}, or None"
            )

    def matches(self, transformer: str, module: str, layer: int) -> bool:
        """Whether the rule applies to the Linear at ``module`` (with a star) of this layer."""
        return (
            (self.transformer is None or self.transformer == transformer)
            and (self.modules is None or module in self.modules)
            and (self.layers is None or layer in self.layers)
        )


@dataclass(frozen=True)
class LinearPlan:
    """Precisions of a pipeline's Linears: the first rule that matches decides, and where none does, ``native``.

    Args:
        rules: at least one.

    Raises:
        ConfigError: if there are none or too many, or one is no rule.
    """

    rules: tuple[LinearRule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not 1 <= len(self.rules) <= _MAX_RULES:
            raise ConfigError(f"LinearPlan has {len(self.rules)} rules; give 1 to {_MAX_RULES}, or no LinearPlan")
        for rule in self.rules:
            if not isinstance(rule, LinearRule):
                raise ConfigError(f"LinearPlan.rules holds {_short(rule)}; every entry must be a LinearRule")

    @staticmethod
    def uniform(precision: str) -> LinearPlan:
        """One precision for every Linear that can have it."""
        return LinearPlan((LinearRule(precision),))

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that its rules name beside ``native``, sorted."""
        return tuple(sorted({rule.precision for rule in self.rules} - {"native"}))

    def lookup(self, transformer: str, module: str, layer: int) -> str:
        """The precision of the Linear at ``module``, such as ``blocks.*.attn1.to_q``, in this layer."""
        for rule in self.rules:
            if rule.matches(transformer, module, layer):
                return rule.precision
        return "native"

    def __str__(self) -> str:
        if len(self.rules) == 1 and self.rules[0] == LinearRule(self.rules[0].precision):
            return self.rules[0].precision
        return f"{', '.join(self.precisions) or 'native'} by {len(self.rules)} rules"


def linear_plan(given: object) -> LinearPlan | None:
    """The plan that is meant by a name of a precision or a :class:`LinearPlan`; ``None`` by ``None`` and ``"none"``.

    Raises:
        ConfigError: if it is something else.
    """
    if given is None or given == "none":
        return None
    if isinstance(given, LinearPlan):
        return given
    if isinstance(given, str) and given in LINEAR_PRECISIONS and given != "native":
        return LinearPlan.uniform(given)
    valid = ", ".join(name for name in LINEAR_PRECISIONS if name != "native")
    raise ConfigError(f"linear is {_short(given)}; valid are {valid}, none, or a LinearPlan")


def linear_to_data(plan: LinearPlan) -> list[dict[str, Any]]:
    """Plain data of its rules, without keys that say nothing."""
    found = []
    for rule in plan.rules:
        data: dict[str, Any] = {"precision": rule.precision}
        for key in ("modules", "layers"):
            if getattr(rule, key) is not None:
                data[key] = list(getattr(rule, key))
        if rule.transformer is not None:
            data["transformer"] = rule.transformer
        found.append(data)
    return found


def linear_from_data(data: object) -> LinearPlan | None:
    """The inverse of :func:`linear_to_data`; the name of a precision stands for a rule without conditions.

    Raises:
        ConfigError: for anything unknown or invalid.
    """
    if data is None or isinstance(data, str):
        return linear_plan(data)
    if not isinstance(data, list | tuple):
        raise ConfigError(f"linear is {_short(data)}; give the name of a precision, or a list of rules")
    rules = []
    for number, entry in enumerate(data, 1):
        if not isinstance(entry, Mapping) or "precision" not in entry or set(entry) - set(_KEYS):
            raise ConfigError(
                f"rule {number} of linear is {_short(entry)}; give a mapping with precision, and where it applies by"
                f" {', '.join(_KEYS[1:])}"
            )
        rules.append(LinearRule(**entry))
    return LinearPlan(tuple(rules))


def _names(modules: object) -> tuple[str, ...]:
    if not isinstance(modules, tuple | list) or not modules:
        raise ConfigError(f"LinearRule.modules is {_short(modules)}; give paths such as blocks.*.ffn.net.2, or None")
    for name in modules:
        if not isinstance(name, str) or len(name) > _MAX_NAME or not _MODULE.fullmatch(name):
            raise ConfigError(
                f"LinearRule.modules holds {_short(name)}; give a path with a star for the layer, such as"
                " blocks.*.ffn.net.2"
            )
    return tuple(sorted(set(modules)))


def _numbers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, tuple | list) or not layers:
        raise ConfigError(f"LinearRule.layers is {_short(layers)}; give layer numbers, or None for all")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= _MAX_LAYER:
            raise ConfigError(
                f"LinearRule.layers holds {_short(layer)}; layers are whole numbers from 0 to {_MAX_LAYER}"
            )
    return tuple(sorted(set(layers)))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
