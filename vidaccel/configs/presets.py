"""Plans written as YAML: the published systems that ship with vidaccel, and a user's own files."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, PlanFileError
from .artifact import load_plan
from .codec import plan_from_data
from .plan import Plan

__all__ = ["load_preset", "load_yaml_plan", "preset_names", "resolve_plan"]

_MAX_YAML_BYTES = 1 << 20
_YAML_SUFFIXES = (".yaml", ".yml")


@cache
def _preset_files() -> dict[str, str]:
    folder = resources.files(__package__) / "presets"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): (folder / name).read_text(encoding="utf-8") for name in names}


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
        raise ConfigError(f"there is no preset {name!r}; valid are {', '.join(preset_names())}")
    return _parse(_preset_files()[name], f"preset {name}")


def load_yaml_plan(path: str | Path) -> Plan:
    """A plan from a YAML file of the presets' form.

    Raises:
        PlanFileError: if the file is missing, too large, or not a valid plan; the message names the place.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_YAML_BYTES + 1)
        if len(raw) > _MAX_YAML_BYTES:
            raise PlanFileError(f"{path} is larger than {_MAX_YAML_BYTES} bytes; a plan in YAML is a few kB")
        return _parse(raw.decode("utf-8"), str(path))
    except FileNotFoundError:
        raise PlanFileError(f"there is no plan file {path}; check the path") from None
    except OSError as error:
        raise PlanFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise PlanFileError(f"{path} is not text in UTF-8; save it as UTF-8") from None


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
        f"{str(plan)!r} is neither a preset nor a plan file; presets are {', '.join(preset_names())},"
        " plan files end in .safetensors or .yaml"
    )


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML without repeated keys, which would silently overwrite each other, and without references."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "references (*name) are not used", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no plan has such keys; the base class names them
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Plan:
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # a subclass of the safe loader
        return plan_from_data(data)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise PlanFileError(f"{where} is not valid YAML{line}: {error.problem}") from None
    except RecursionError:
        raise PlanFileError(f"{where} is not a plan: it is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ConfigError is a ValueError
        raise PlanFileError(f"{where} is not a plan: {str(error).splitlines()[0]}") from None
