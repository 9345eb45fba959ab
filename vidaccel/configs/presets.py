"""Plans written as YAML: the published systems that ship with vidaccel, and a user's own files."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from ..errors import ConfigError, PlanFileError, did_you_mean
from .artifact import load_plan
from .codec import plan_from_data
from .plan import Plan
from .strict_yaml import parse_yaml, read_yaml

__all__ = ["load_preset", "load_yaml_plan", "preset_names", "resolve_plan"]

_YAML_SUFFIXES = (".yaml", ".yml")


@cache
def _preset_files() -> dict[str, str]:
    folder = resources.files(__package__) / "presets"
    names = sorted(e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name.endswith(".yaml"))
    return {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in names}


def preset_names() -> list[str]:
    """Names of the plans that ship with vidaccel, sorted."""
    return list(_preset_files())


@cache
def load_preset(name: str) -> Plan:
    """A plan that ships with vidaccel; ``summary`` and ``source`` are in its provenance.

    Raises:
        ConfigError: if there is none of that name; the message lists the names.
    """
    if name not in _preset_files():
        raise ConfigError(
            f"there is no preset {name!r}; valid are {', '.join(preset_names())}{did_you_mean(name, preset_names())}"
        )
    return parse_yaml(_preset_files()[name], f"preset {name}", "a plan", plan_from_data, PlanFileError)


def load_yaml_plan(path: str | Path) -> Plan:
    """A plan from a YAML file of the presets' form.

    Raises:
        PlanFileError: if the file is missing, too large, or not a valid plan; the message names the place.
    """
    return read_yaml(path, "a plan", plan_from_data, PlanFileError)


def resolve_plan(plan: Plan | str | Path) -> Plan:
    """The plan that is meant: a plan itself, a preset's name, or the path of a .safetensors or .yaml file.

    A text without one of these suffixes is a preset's name, whatever files exist.

    Raises:
        ConfigError: if it is none of these; :class:`PlanFileError` if the file is no valid plan.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | Path):
        raise ConfigError(f"plan is a {type(plan).__name__}; give a Plan, a preset's name or the path of a plan file")
    suffix = Path(plan).suffix.lower()
    if suffix == ".safetensors":
        return load_plan(plan)
    if suffix in _YAML_SUFFIXES:
        return load_yaml_plan(plan)
    if isinstance(plan, str) and plan in _preset_files():
        return load_preset(plan)
    raise ConfigError(
        f"{str(plan)!r} is neither a preset nor a plan file; presets are {', '.join(preset_names())}, plan files end in"
        f" .safetensors or .yaml{did_you_mean(str(plan), preset_names())}"
    )
