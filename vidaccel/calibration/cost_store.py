"""Measured costs on disk: one JSON file for each device and set of versions, in it one entry for each shape."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..device import cache_dir
from ..errors import ConfigError
from ..files import write_json
from ..version import __version__

__all__ = ["CostStore", "cost_cache"]


def cost_cache() -> Path:
    """The folder for what was measured on this machine; it may not exist yet."""
    return cache_dir() / "costs"


class CostStore:
    """The cache file of one device and one set of versions: times by shape and policy."""

    def __init__(self, folder: Path, device_name: str) -> None:
        told = {"device": device_name, "versions": _versions()}
        digest = sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
        self.path = folder / f"{slug}-{digest}.json"
        self._head = told

    def read(self, shape: str) -> dict[str, Any]:
        """The times of a shape, empty if nothing is known: ``dense``, ``mixing`` or ``None``, ``policies`` by key."""
        found = self._entries().get(shape, {})
        if found and not (set(found) == {"dense", "mixing", "policies"} and isinstance(found["policies"], dict)):
            raise self._damaged(f"its entry for {shape} has another form")
        return found

    def write(self, shape: str, found: dict[str, Any]) -> None:
        """Keeps the times of a shape."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self._head, "entries": {**self._entries(), shape: found}})

    def _entries(self) -> dict[str, dict[str, Any]]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["entries"]
            return {str(key): dict(entry) for key, entry in entries.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, reason: str) -> ConfigError:
        return ConfigError(f"the file of measured costs {self.path} cannot be used ({reason}); delete it and run again")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"vidaccel": __version__, "torch": torch.__version__}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = None
    return found
