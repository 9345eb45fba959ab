"""What calibration may choose from: sets of head policies, written as YAML.

A set is the product of its patterns, compensations, precisions and, where given, skip factors, and single policies that
it names besides; plain dense attention always belongs to it and comes first. Which of them make sense on a device and a
token grid is asked later, by :func:`usable`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..compensation import build_compensation
from ..configs.codec import policy_from_data, take, tile_from_data
from ..configs.pattern_spec import CompensationSpec, PatternSpec
from ..configs.plan import HeadPolicy
from ..configs.strict_yaml import parse_yaml, read_yaml
from ..engine.prepare import check_policy, request_of
from ..errors import ConfigError, KernelError, did_you_mean
from ..kernels.dispatch import select
from ..layout import TokenLayout
from ..patterns import build_pattern
from ..patterns.base import StaticPattern
from ..types import TileShape
from .predicted import find_gpu, why_not_on

__all__ = ["CandidateSet", "candidate_names", "load_candidates", "usable"]

_KEYS = ("name", "summary", "tile", "patterns", "compensations", "precisions", "skips", "policies")
_WHAT = "a set of candidates"
_SUFFIXES = (".yaml", ".yml")

#: Why a policy cannot run, or ``None``.
_WhyNot = Callable[[HeadPolicy], str | None]


@dataclass(frozen=True)
class CandidateSet:
    """Policies to choose from.

    Args:
        name: what reports call the set.
        summary: one sentence on what is in it.
        tile: the tile shape they are meant for, or ``None`` for the one that wastes least.
        policies: without repeats, plain dense attention first.

    Raises:
        ConfigError: if plain dense attention does not come first, or a policy comes twice.
    """

    name: str
    summary: str
    tile: TileShape | None
    policies: tuple[HeadPolicy, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        if not self.policies or not self.policies[0].is_dense:
            raise ConfigError(f"candidate set {self.name!r} does not begin with plain dense attention; put it first")
        if len(set(self.policies)) != len(self.policies):
            twice = next(p for i, p in enumerate(self.policies) if p in self.policies[:i])
            raise ConfigError(f"candidate set {self.name!r} has {twice} twice; give each policy once")


@cache
def _shipped() -> dict[str, str]:
    folder = resources.files(__package__) / "candidates"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): (folder / name).read_text(encoding="utf-8") for name in names}


def candidate_names() -> list[str]:
    """Names of the sets that ship with vidaccel, sorted: one for each type of device, and others."""
    return list(_shipped())


def load_candidates(name_or_path: str | Path) -> CandidateSet:
    """A set that ships with vidaccel, or one from the user's YAML file.

    A text without the suffix .yaml or .yml is a shipped set's name, whatever files exist.

    Raises:
        ConfigError: if there is no such set or file, or it is not valid; the message names the place.
    """
    if Path(name_or_path).suffix.lower() in _SUFFIXES:
        return read_yaml(name_or_path, _WHAT, _from_data)
    text = _shipped().get(str(name_or_path))
    if text is None:
        raise ConfigError(
            f"{str(name_or_path)!r} is neither a candidate set nor a file of one; sets are"
            f" {', '.join(candidate_names())}, files end in .yaml" + did_you_mean(str(name_or_path), candidate_names())
        )
    return parse_yaml(text, f"candidate set {name_or_path}", _WHAT, _from_data)


def _from_data(data: object) -> CandidateSet:
    given = take(data, _KEYS, "the set")
    for key in ("name", "summary"):
        if not isinstance(given.get(key), str) or not given[key].strip():
            raise ConfigError(f"{key} is {given.get(key)!r}; give a text")
    patterns, compensations, precisions = (_entries(given, key) for key in ("patterns", "compensations", "precisions"))
    skips = _entries(given, "skips") if "skips" in given else [0.0]
    policies = {HeadPolicy(): None}
    specs: set[PatternSpec] = set()
    for number, entry in enumerate(patterns, 1):
        try:
            spec = PatternSpec.from_data(entry)
            build_pattern(spec)  # so that a wrong name or parameter is found now, not in the middle of a run
            if spec in specs:
                raise ConfigError(f"{spec} comes twice; give each pattern once")
            specs.add(spec)
            for entry in compensations:
                compensation = CompensationSpec.from_data(entry)
                build_compensation(compensation)
                if spec.name == "dense" and compensation.name != "none":
                    continue  # nothing is skipped, so there is nothing to repair
                for precision, skip in product(precisions, skips):
                    policy = HeadPolicy(spec, precision, compensation, skip)
                    check_policy(policy)
                    policies[policy] = None
        except ConfigError as error:
            raise ConfigError(f"pattern {number}: {error}") from None
    for number, entry in enumerate(_entries(given, "policies") if "policies" in given else [], 1):
        try:
            policy = policy_from_data(entry)
            check_policy(policy)
            if policy in policies:
                raise ConfigError(f"{policy} is in the set already; give each policy once")
            policies[policy] = None
        except ConfigError as error:
            raise ConfigError(f"policy {number}: {error}") from None
    return CandidateSet(given["name"], given["summary"], tile_from_data(given.get("tile")), tuple(policies))


def _entries(given: dict[str, Any], key: str) -> list[Any]:
    found = given.get(key)
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{key} is {found!r}; give a list of at least one")
    return list(found)


def usable(
    candidates: CandidateSet,
    layout: TokenLayout,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    head_dim: int,
    distinct: bool = True,
) -> tuple[tuple[HeadPolicy, ...], dict[HeadPolicy, str]]:
    """The candidates that can run there and differ from each other.

    Patterns that choose their blocks in each call are kept without a look at them.

    Args:
        layout: token order and blocks of the video.
        device: where attention runs: a device of this machine, or the name of a GPU as
            :func:`.predicted.find_gpu` takes it.
        dtype: of q, k and v.
        head_dim: channels of one head.
        distinct: leave out what comes out as the same blocks as another.

    Returns:
        The policies that stay, plain dense attention first, and one sentence for each that does not.

    Raises:
        ConfigError: if there is no such device and no GPU of that name is known.
    """
    why_not = _ask(layout, device, dtype, head_dim)
    kept: list[HeadPolicy] = []
    reasons: dict[HeadPolicy, str] = {}
    seen: dict[tuple[bytes, str, str, str, float], HeadPolicy] = {}
    for policy in candidates.policies:
        rule = build_compensation(policy.compensation)
        pattern = build_pattern(policy.pattern)
        if isinstance(pattern, StaticPattern):
            blocks = pattern.blocks(layout)
            rule_inside = repr(pattern) if pattern.cuts_blocks else ""  # equal blocks may hold different tokens
            key = (blocks.numpy().tobytes(), rule_inside, policy.precision, policy.compensation.key, policy.skip)
            if bool(blocks.all()) and not rule_inside and rule.name != "none" and not rule.always:
                reasons[policy] = f"keeps every block of a {layout.grid} grid, so nothing is left to compensate"
                continue
            same = seen.setdefault(key, policy)
            if distinct and same is not policy:
                reasons[policy] = f"keeps the same blocks of a {layout.grid} grid as {same}"
                continue
        lacking = None if policy.is_dense else why_not(policy)
        if lacking is None:
            kept.append(policy)
        else:
            reasons[policy] = lacking
    return tuple(kept), reasons


def _ask(layout: TokenLayout, device: str | torch.device, dtype: torch.dtype, head_dim: int) -> _WhyNot:
    """Says why a policy cannot run on a device of this machine, or on a GPU that is not here."""
    try:
        here = torch.device(device)
    except RuntimeError:
        gpu = find_gpu(str(device))
        return lambda policy: why_not_on(gpu, policy, layout, dtype=dtype, head_dim=head_dim)

    def why_not(policy: HeadPolicy) -> str | None:
        try:
            kernel = select(request_of(policy, here.type, dtype, head_dim))
        except KernelError as error:
            return str(error)
        if kernel.name == "emulated":
            return f"it is only emulated on {here.type}, which never saves time"
        return None

    return why_not
