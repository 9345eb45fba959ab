"""What a plan was made for, and in which words it differs from what is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from ..errors import ConfigError
from ..types import VideoGrid

__all__ = ["ConfigValue", "Fingerprint"]

#: Far above any model; a plan file of a stranger must not make ``inspect`` draw a billion heads or tokens.
_MOST = 65_535
_MOST_TOKENS = 1 << 24

#: What a configuration entry may be.
ConfigValue: TypeAlias = "bool | int | float | str | tuple[ConfigValue, ...] | None"

_LABELS = {
    "model_class": "model class",
    "heads": "number of heads",
    "layers": "number of layers",
    "grid": "token grid",
    "scheduler": "scheduler",
}


@dataclass(frozen=True)
class Fingerprint:
    """The model, grid and scheduler a plan was made for. A field that is ``None`` fits anything.

    Args:
        model_class: class name of the transformer.
        config: (key, value) pairs of the configuration that change attention, such as ``patch_size``; kept sorted.
        heads: attention heads per layer.
        layers: attention layers of the transformer.
        grid: token grid of the video.
        scheduler: class name of the scheduler.
        vidaccel: version that made the plan.

    Raises:
        ConfigError: if a field has the wrong type.
    """

    model_class: str | None = None
    config: tuple[tuple[str, ConfigValue], ...] = ()
    heads: int | None = None
    layers: int | None = None
    grid: VideoGrid | None = None
    scheduler: str | None = None
    vidaccel: str | None = None

    def __post_init__(self) -> None:
        for name in ("model_class", "scheduler", "vidaccel"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"Fingerprint.{name} is {getattr(self, name)!r}; give a text or None")
        for name in ("heads", "layers"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MOST):
                raise ConfigError(f"Fingerprint.{name} is {count!r}; give a whole number from 1 to {_MOST}, or None")
        if not isinstance(self.grid, VideoGrid | None):
            raise ConfigError(f"Fingerprint.grid is {self.grid!r}; give VideoGrid(frames, height, width) or None")
        if self.grid is not None and self.grid.tokens > _MOST_TOKENS:
            raise ConfigError(f"Fingerprint.grid is {self.grid}; give a grid of at most {_MOST_TOKENS} tokens")
        pairs = dict(self.config)
        if not all(isinstance(key, str) for key in pairs):
            raise ConfigError(f"Fingerprint.config has keys {list(pairs)!r}; all must be text")
        object.__setattr__(self, "config", tuple(sorted((key, _frozen(value)) for key, value in pairs.items())))

    @staticmethod
    def make(config: Mapping[str, Any] | None = None, **named: Any) -> Fingerprint:
        """A fingerprint with its configuration given as a mapping; lists become tuples."""
        return Fingerprint(config=tuple((config or {}).items()), **named)

    def differences(self, other: Fingerprint) -> list[str]:
        """One readable phrase for each thing in which ``other``, what is here, is not what the plan was made for.

        Fields and configuration keys that either side lacks are not compared. Of the version only major and minor
        count: a patch release reads the plans of its siblings.
        """
        found = []
        for name, label in _LABELS.items():
            mine, here = getattr(self, name), getattr(other, name)
            if mine is not None and here is not None and mine != here:
                found.append(f"{label} is {here}, the plan was made for {mine}")
        here_config = dict(other.config)
        for key, mine in self.config:
            here = here_config.get(key)
            if mine is not None and here is not None and mine != here:
                found.append(f"config {key} is {here!r}, the plan was made for {mine!r}")
        if self.vidaccel and other.vidaccel and _series(self.vidaccel) != _series(other.vidaccel):
            found.append(f"vidaccel is {other.vidaccel}, the plan was made by {self.vidaccel}")
        return found

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["grid"] = None if self.grid is None else list(self.grid)
        data["config"] = {key: _plain(value) for key, value in self.config}
        return data

    @staticmethod
    def from_data(data: object) -> Fingerprint:
        """The inverse of :meth:`to_data`.

        Raises:
            ConfigError: for unknown keys or values of the wrong type.
        """
        names = [field.name for field in fields(Fingerprint)]
        if not isinstance(data, Mapping):
            raise ConfigError(f"a fingerprint is {data!r}; give a mapping with {', '.join(names)}")
        unknown = sorted(str(key) for key in set(data) - set(names))
        if unknown:
            raise ConfigError(f"a fingerprint has unknown keys {', '.join(unknown)}; valid are {', '.join(names)}")
        named = dict(data)
        config, grid = named.pop("config", {}), named.pop("grid", None)
        if not isinstance(config, Mapping):
            raise ConfigError(f"Fingerprint.config is {config!r}; give a mapping")
        if grid is not None:
            if not isinstance(grid, list | tuple) or len(grid) != 3:
                raise ConfigError(f"Fingerprint.grid is {grid!r}; give [frames, height, width]")
            grid = VideoGrid(*grid)
        return Fingerprint.make(config, grid=grid, **named)


def _series(version: str) -> list[str]:
    return version.split(".")[:2]


def _frozen(value: Any, depth: int = 4) -> ConfigValue:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and depth > 0:
        return tuple(_frozen(item, depth - 1) for item in value)
    raise ConfigError(f"Fingerprint.config holds {value!r}; give numbers, texts, or lists of them")


def _plain(value: ConfigValue) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
