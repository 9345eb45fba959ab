"""What is measured of the systems, written down one generation at a time, so that a killed run goes on where it was.

A file holds the protocol, the knobs found so far and one row for each generation. Processes that share the work write a
file each (``results-1of2.json`` beside ``results.json``) and read all of them to see what is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidaccel.device import device_info
from vidaccel.errors import ConfigError
from vidaccel.files import write_json

from .system_knobs import PRESETS, SYSTEMS, Try

__all__ = ["AS_IT_IS", "Cell", "Row", "Store", "family", "read_rows"]

Row = dict[str, Any]
#: What a plan that is measured as it is has in place of a density to match.
AS_IT_IS = 0.0
#: What makes a generation of the table unique.
KEY = ("system", "compensation", "aimed", "precision", "prompt", "seed", "edition")


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Args:
        system: a name of :data:`SYSTEMS`, or what a plan is called.
        aimed: density of the sparse steps.
        precision: on top of the system's own where it is not ``"native"``.
        compensation: ``"own"`` for the system's.
    """

    system: str
    aimed: float
    precision: str = "native"
    compensation: str = "own"

    @property
    def edition(self) -> int:
        """That of the system or preset as it is now."""
        if self.aimed == AS_IT_IS:
            return PRESETS.get(self.system, 1)
        return SYSTEMS[self.system].edition if self.system in SYSTEMS else 1

    @property
    def knob_key(self) -> str:
        """Cells of one key have one setting."""
        edition = "" if self.edition == 1 else f"|edition {self.edition}"
        return f"{self.system}|{self.compensation}|{self.aimed:g}{edition}"


@dataclass(eq=False)
class Store:
    """The rows and knobs of a run and of the processes it shares its work with.

    Args:
        path: what this process writes; ``None`` writes nothing.
        protocol: what all rows of a file have in common.
        key: names of what makes a generation unique.

    Raises:
        ConfigError: if a file there was made by another protocol.
    """

    path: Path | None
    protocol: dict[str, Any]
    key: tuple[str, ...] = KEY
    rows: list[Row] = field(default_factory=list)
    knobs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    _done: set[tuple[Any, ...]] = field(default_factory=set)
    _others: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        for path in family(self.path):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["protocol"] != self.protocol:
                raise ConfigError(
                    f"{path} was measured by another protocol ({content['protocol']} instead of {self.protocol});"
                    " name another file, or remove it"
                )
            self._done |= {self._key(row) for row in content["rows"]}
            self._others |= content["knobs"]
            if path == self.path:
                self.rows, self.knobs = content["rows"], content["knobs"]

    def has(self, row: Row) -> bool:
        """Whether this generation is written down already, here or by another process at the start."""
        return self._key(row) in self._done

    def tries(self, cell: Cell) -> tuple[Try, ...]:
        """The settings tried for a cell; empty before any."""
        found = self.knobs.get(cell.knob_key) or self._others.get(cell.knob_key) or []
        return tuple(Try(**one) for one in found)

    def add(self, row: Row) -> None:
        """Writes a generation down."""
        self.rows.append(row)
        self._done.add(self._key(row))
        self._write()

    def settle(self, cell: Cell, tries: Sequence[Try]) -> None:
        """Writes a cell's settings down."""
        self.knobs[cell.knob_key] = [vars(one) for one in tries]
        self._write()

    def _key(self, row: Row) -> tuple[Any, ...]:
        return _named_by(row, self.key)

    def _write(self) -> None:
        if self.path is not None:
            environment = device_info().to_dict()
            write_json(
                self.path,
                {"environment": environment, "protocol": self.protocol, "knobs": self.knobs, "rows": self.rows},
            )


def family(path: Path) -> list[Path]:
    """The existing files of one measurement: ``path`` and those of its shards, whichever of them is named."""
    stem = re.sub(r"-\d+of\d+$", "", path.stem)
    name = re.compile(re.escape(stem) + r"(-\d+of\d+)?" + re.escape(path.suffix))
    return sorted(found for found in path.parent.glob(f"{stem}*{path.suffix}") if name.fullmatch(found.name))


def read_rows(paths: Sequence[Path], key: tuple[str, ...] = KEY) -> list[Row]:
    """The rows of all files of these measurements, each generation once.

    Raises:
        ConfigError: if there is no such file.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        files = family(path)
        if not files:
            raise ConfigError(f"there is no {path}; measure first, with --json {path}")
        for file in files:
            content = json.loads(file.read_text(encoding="utf-8"))
            found |= {_named_by(row, key): row for row in content["rows"]}
    return list(found.values())


def _named_by(row: Row, key: tuple[str, ...]) -> tuple[Any, ...]:
    """What makes a row unique; one without an edition is of the first."""
    return tuple(row.get(name, 1) if name == "edition" else row[name] for name in key)
