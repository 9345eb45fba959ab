"""The files of the plans that ship with vidaccel: which names there are, before anything is read as a plan."""

from __future__ import annotations

from functools import cache
from importlib import resources

__all__ = ["preset_files", "preset_names"]


@cache
def preset_files() -> dict[str, str]:
    """Text of each preset's file by name, sorted."""
    folder = resources.files(__package__) / "presets"
    names = sorted(e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name.endswith(".yaml"))
    return {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in names}


def preset_names() -> list[str]:
    """Names of the plans that ship with vidaccel, sorted."""
    return list(preset_files())
