"""What calibration knows of Linears: their errors by noise level, what those do to the latent, and their seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..configs.linear import LINEAR_PRECISIONS, LinearRule
from ..errors import ConfigError, PlanFileError
from ..linear.measure import LinearErrors
from ..types import TRANSFORMERS

__all__ = ["LinearTable", "cost_key"]

_ITEM = ("transformer", "module", "layer", "kind", "size", "bias", "dtype", "site", "rows", "calls", "energy", "error")
_KEYS = ("precisions", "generations", "items", "changes", "seconds")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_MOST = 1 << 16


@dataclass(eq=False)
class LinearTable:
    """Everything seen of Linears.

    Args:
        precisions: which may be chosen.
        items: the Linears, with what was seen in all generations together.
        generations: how many were watched.
        changes: by precision and kind, the relative L2 change of the first prompt's latent with all Linears of that
            kind in that precision.
        seconds: by :func:`cost_key` and precision, ``native`` among them, of one call.
    """

    precisions: tuple[str, ...]
    items: list[LinearErrors] = field(default_factory=list)
    generations: int = 0
    changes: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, found: Sequence[LinearErrors]) -> None:
        """Takes in what one more generation showed of the same Linears."""
        self.generations += 1
        if not self.items:
            self.items = list(found)
            return
        for item, new in zip(self.items, found, strict=True):
            item.rows += (new.rows - item.rows) * new.calls / max(1, item.calls + new.calls)
            item.calls += new.calls
            item.energy = [a + b for a, b in zip(item.energy, new.energy, strict=True)]
            for precision, error in new.error.items():
                before = item.error.get(precision, [0.0] * item.bins)
                item.error[precision] = [a + b for a, b in zip(before, error, strict=True)]

    def kinds(self, precision: str) -> tuple[str, ...]:
        """Parts of the blocks with a Linear that can have this precision."""
        return tuple(dict.fromkeys(item.kind for item in self.items if precision in item.error))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        items = []
        for item in self.items:
            data = {name: getattr(item, name) for name in _ITEM}
            items.append({**data, "size": list(item.size), "dtype": str(item.dtype).removeprefix("torch.")})
        return {
            "precisions": list(self.precisions),
            "generations": self.generations,
            "items": items,
            "changes": self.changes,
            "seconds": self.seconds,
        }

    @staticmethod
    def from_dict(data: object, bins: int) -> LinearTable:
        """The inverse of :meth:`to_dict`.

        Args:
            bins: noise bins of the observations that it belongs to.

        Raises:
            PlanFileError: for anything missing, unknown, or not a figure.
        """
        given = _mapping(data, _KEYS, "its table of Linears")
        precisions = given["precisions"]
        if not isinstance(precisions, list) or not precisions or not _all_in(precisions, LINEAR_PRECISIONS):
            raise PlanFileError("its table of Linears names no precisions; write it again")
        if not isinstance(given["items"], list) or len(given["items"]) > _MOST:
            raise PlanFileError("its Linears are no list; write it again")
        table = LinearTable(
            tuple(precisions),
            [_item(item, bins, precisions) for item in given["items"]],
            _whole(given["generations"], "generations"),
            {p: _figures(kinds) for p, kinds in sorted(_of_texts(given["changes"]).items())},
            {key: _figures(times) for key, times in sorted(_of_texts(given["seconds"]).items())},
        )
        if not _all_in(table.changes, precisions) or not all(
            _all_in(kinds, table.kinds(precision)) for precision, kinds in table.changes.items()
        ):
            raise PlanFileError("its Linears were run in precisions or kinds that it does not have; write it again")
        needed: dict[str, set[str]] = {}
        for item in table.items:
            needed.setdefault(cost_key(item), {"native"}).update(item.error)
        if table.seconds and needed != {key: set(times) for key, times in table.seconds.items()}:
            raise PlanFileError("its seconds are not those of its Linears; write it again")
        return table


def cost_key(item: LinearErrors) -> str:
    """What decides the seconds of one call, as text."""
    bias = " + bias" if item.bias else ""
    dtype = str(item.dtype).removeprefix("torch.")
    return f"{round(item.rows)} tokens, {item.size[1]} to {item.size[0]}{bias}, {dtype}"


def _item(data: object, bins: int, precisions: Sequence[str]) -> LinearErrors:
    given = _mapping(data, _ITEM, "one of its Linears")
    try:
        LinearRule("native", (given["module"],), (given["layer"],))  # a path and a layer's number
    except ConfigError as error:
        raise PlanFileError(str(error)) from None
    size, dtype = given["size"], given["dtype"]
    errors = _of_texts(given["error"])
    good = (
        given["transformer"] in TRANSFORMERS
        and isinstance(given["kind"], str)
        and isinstance(given["bias"], bool)
        and isinstance(size, list)
        and len(size) == 2
        and all(0 < _whole(n, "sizes") <= 1 << 24 for n in size)
        and isinstance(dtype, str)
        and dtype in _DTYPES
        and _all_in(errors, precisions)
    )
    if not good:
        raise PlanFileError(f"its figures of the Linear {given['module']} are not those of one; write it again")
    return LinearErrors(
        given["transformer"],
        given["module"],
        given["layer"],
        given["kind"],
        (size[0], size[1]),
        given["bias"],
        _DTYPES[dtype],
        bins,
        None if given["site"] is None else _whole(given["site"], "layers"),
        _figures({"rows": given["rows"]})["rows"],
        _whole(given["calls"], "calls"),
        _bins(given["energy"], bins),
        {precision: _bins(error, bins) for precision, error in sorted(errors.items())},
    )


def _mapping(data: object, keys: Sequence[str], what: str) -> dict[str, Any]:
    if not isinstance(data, Mapping) or set(data) != set(keys):
        raise PlanFileError(f"{what} has not the keys {', '.join(keys)}; write it again")
    return dict(data)


def _of_texts(data: object) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise PlanFileError("its figures of Linears are no mapping; write it again")
    return data


def _figures(data: object) -> dict[str, float]:
    found = _of_texts(data)
    for value in found.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise PlanFileError("its figures of Linears are no numbers of at least 0; write it again")
    return {key: float(value) for key, value in sorted(found.items())}


def _bins(values: object, bins: int) -> list[float]:
    if not isinstance(values, list) or len(values) != bins:
        raise PlanFileError(f"its errors of Linears are not those of {bins} noise bins; write it again")
    return [_figures({"value": value})["value"] for value in values]


def _whole(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise PlanFileError(f"its {what} of Linears are no whole numbers; write it again")
    return value


def _all_in(names: Any, valid: Any) -> bool:
    return all(isinstance(name, str) and name in valid for name in names)
