"""Plans as plain data, strictly read: what YAML files and the JSON inside plan files share.

A policy is ``{pattern, precision, compensation, skip}``; a rule is ``{noise, transformer, layers, branch}`` with
either a policy's keys for all heads alike, or ``heads``, a list of policies. Unknown keys are errors, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..types import TileShape
from .fingerprint import Fingerprint
from .linear import linear_from_data, linear_to_data
from .pattern_spec import CompensationSpec, PatternSpec
from .plan import HeadPolicy, LayerPolicy, Plan, Rule

__all__ = ["plan_from_data", "plan_to_data", "policy_from_data", "policy_to_data", "take", "tile_from_data"]

_POLICY_KEYS = ("pattern", "precision", "compensation", "skip")
_RULE_KEYS = ("noise", "transformer", "layers", "branch", "heads", *_POLICY_KEYS)
_PLAN_KEYS = ("name", "summary", "source", "tile", "rules", "fingerprint", "provenance", "cache", "linear")


def take(data: object, valid: Sequence[str], what: str) -> dict[str, Any]:
    """``data`` as a dict.

    Raises:
        ConfigError: unless it is a mapping with no other keys than ``valid``.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what} is {_short(data)}; give a mapping with keys among {', '.join(valid)}")
    unknown = sorted(str(key) for key in data if key not in valid)
    if unknown:
        raise ConfigError(f"{what} has unknown keys {_short(', '.join(unknown))}; valid are {', '.join(valid)}")
    return dict(data)


def policy_to_data(policy: HeadPolicy) -> dict[str, Any]:
    """Plain data of one head's policy."""
    plain = not policy.compensation.params
    return {
        "pattern": policy.pattern.to_data(),
        "precision": policy.precision,
        "compensation": policy.compensation.name if plain else policy.compensation.to_data(),
        **({"skip": policy.skip} if policy.skip else {}),
    }


def policy_from_data(data: object, what: str = "a policy") -> HeadPolicy:
    """The inverse of :func:`policy_to_data`; ``what`` names the place in error messages."""
    given = take(data, _POLICY_KEYS, what)
    if "pattern" not in given:
        raise ConfigError(f"{what} has no 'pattern'; write for example pattern: dense")
    given["pattern"] = PatternSpec.from_data(given["pattern"])
    if "compensation" in given:
        given["compensation"] = CompensationSpec.from_data(given["compensation"])
    return HeadPolicy(**given)


def tile_from_data(data: object) -> TileShape | None:
    """A tile shape from ``[frames, height, width]``, or ``None`` from ``None``."""
    if data is None:
        return None
    if not isinstance(data, list | tuple) or len(data) != 3:
        raise ConfigError(f"tile is {_short(data)}; give [frames, height, width] or leave it out")
    return TileShape(*data)


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """Plain data of a whole plan, without keys that say nothing; fit for YAML."""
    data: dict[str, Any] = {"name": plan.name}
    if plan.tile is not None:
        data["tile"] = list(plan.tile)
    if plan.cache is not None:
        data["cache"] = plan.cache
    if plan.linear is not None:
        data["linear"] = linear_to_data(plan.linear)
    if plan.fingerprint is not None:
        data["fingerprint"] = plan.fingerprint.to_data()
    if plan.provenance:
        data["provenance"] = dict(plan.provenance)
    data["rules"] = [_rule_to_data(rule) for rule in plan.rules]
    return data


def plan_from_data(data: object) -> Plan:
    """The inverse of :func:`plan_to_data`. ``summary`` and ``source`` go into the provenance.

    Raises:
        ConfigError: for anything unknown, missing or invalid; the message names the rule.
    """
    given = take(data, _PLAN_KEYS, "the plan")
    for key in ("name", "rules"):
        if key not in given:
            raise ConfigError(f"the plan has no '{key}'; valid keys are {', '.join(_PLAN_KEYS)}")
    rules, provenance = given["rules"], given.get("provenance", {})
    if not isinstance(rules, list):
        raise ConfigError(f"rules is {_short(rules)}; give a list of rules, [] for dense everywhere")
    if not isinstance(provenance, Mapping):
        raise ConfigError(f"provenance is {_short(provenance)}; give a mapping of texts")
    about = {key: given[key] for key in ("summary", "source") if key in given}
    fingerprint = given.get("fingerprint")
    return Plan(
        name=given["name"],
        rules=tuple(_rule_from_data(rule, f"rule {number}") for number, rule in enumerate(rules, 1)),
        tile=tile_from_data(given.get("tile")),
        fingerprint=None if fingerprint is None else Fingerprint.from_data(fingerprint),
        provenance=tuple({**provenance, **about}.items()),
        cache=given.get("cache"),
        linear=linear_from_data(given.get("linear")),
    )


def _rule_to_data(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {"noise": list(rule.noise)}
    for key in ("transformer", "branch"):
        if getattr(rule, key) is not None:
            data[key] = getattr(rule, key)
    if rule.layers is not None:
        data["layers"] = list(rule.layers)
    heads = [policy_to_data(head) for head in rule.policy.heads]
    return {**data, **heads[0]} if len(heads) == 1 else {**data, "heads": heads}


def _rule_from_data(data: object, what: str) -> Rule:
    given = take(data, _RULE_KEYS, what)
    where = {key: given.pop(key) for key in ("noise", "transformer", "layers", "branch") if key in given}
    try:
        if "heads" not in given:
            return Rule(LayerPolicy((policy_from_data(given, what),)), **where)
        heads = given.pop("heads")
        if given:
            raise ConfigError(f"it has both 'heads' and {', '.join(given)}; put those into the entries of 'heads'")
        if not isinstance(heads, list):
            raise ConfigError(f"heads is {_short(heads)}; give a list of policies")
        policies = tuple(policy_from_data(head, f"head {number}") for number, head in enumerate(heads))
        return Rule(LayerPolicy(policies), **where)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(what) else f"{what}: {message}") from None


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
