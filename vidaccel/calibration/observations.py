"""What calibration has seen of a model: one small file that every plan is solved from.

A *cell* is (noise bin, transformer, layer, guidance branch). For each cell, candidate and head it holds means over
prompts, because prompts are what repeats: the tokens and steps of one prompt are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..configs.codec import policy_from_data, policy_to_data, take, tile_from_data
from ..configs.fingerprint import Fingerprint
from ..configs.plan import BRANCHES, TRANSFORMERS, HeadPolicy
from ..configs.sealed import Sealed
from ..errors import ConfigError, PlanFileError
from ..types import TileShape
from .cache_runs import CacheRun
from .cells import FIELDS, Cell, Floats, Place, Sample
from .linear_table import LinearTable
from .shape import Shape

__all__ = ["Observations"]

_FILE = Sealed(
    kind="observations",
    version=1,
    writer="vidaccel calibrate",
    tensors={
        "place": np.int32,
        "prompts": np.int32,
        "energy": np.float32,
        **dict.fromkeys(FIELDS, np.float32),
        "weight": np.float64,
        "edges": np.float64,
    },
    max_bytes=256 << 20,  # 40 layers of 40 heads, 5 bins, 2 branches, 60 candidates: 20 MB in all
)
#: Far above any model: 40 layers of two transformers, 5 bins and 2 branches with 60 candidates have 48,000.
_MOST_ROWS = 1 << 20
_META = (
    *("candidates", "tile", "fingerprint", "done", "settings", "times", "steps", "probes", "costs", "notes"),
    "provenance",
)


@dataclass(eq=False)
class Observations:
    """Everything seen so far.

    Args:
        candidates: the policies compared; the first is plain dense attention.
        tile: tile shape of their blocks, or ``None`` for the layout's choice.
        fingerprint: of the model, with its token grid.
        edges: bounds of the noise bins, ascending from 0 to 1.
        steps: denoising steps of each bin in one generation.
        settings: of the run, JSON-able; see :func:`.fingerprints.run_settings`.
        cells: by place.
        weight: (bin, transformer, layer) -> squared relative error of the final latent for one unit of error there.
        done: fingerprints of the prompts and seeds that are in.
        times: seconds of a dense generation: ``total``, and ``attention`` in it.
        probes: what was found by perturbing, for reports.
        costs: seconds by policy on the device of the run, :meth:`.cost.Costs.to_dict`; empty if not measured yet.
        notes: things worth knowing.
        provenance: texts on where this comes from.
        shape: of one attention call; ``None`` in files of earlier versions.
        caches: what step caches did in dense generations.
        linears: what is known of Linears, if they were looked at.
    """

    candidates: tuple[HeadPolicy, ...]
    tile: TileShape | None
    fingerprint: Fingerprint
    edges: tuple[float, ...]
    steps: tuple[int, ...]
    settings: dict[str, Any]
    cells: dict[Place, Cell] = field(default_factory=dict)
    weight: dict[tuple[int, str, int], float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    shape: Shape | None = None
    caches: list[CacheRun] = field(default_factory=list)
    linears: LinearTable | None = None

    @property
    def bins(self) -> int:
        """Number of noise bins."""
        return len(self.edges) - 1

    def bounds(self, number: int) -> tuple[float, float]:
        """Noise levels (low, high] of a bin."""
        return self.edges[number], self.edges[number + 1]

    def bin_of(self, noise_level: float) -> int:
        """The bin of a noise level in [0, 1]."""
        return max(0, min(self.bins, int(np.searchsorted(self.edges, noise_level, side="left"))) - 1)

    def places(self) -> list[tuple[int, str, int]]:
        """(bin, transformer, layer) of all cells, sorted: where decisions are made."""
        return sorted({(place.bin, place.transformer, place.layer) for place in self.cells})

    def at(self, bin: int, transformer: str, layer: int) -> list[Cell]:
        """The cells of one decision: one for each guidance branch."""
        where = (bin, transformer, layer)
        return [c for p, c in sorted(self.cells.items()) if (p.bin, p.transformer, p.layer) == where]

    def total(self, where: tuple[int, str, int], name: str) -> Floats:
        """A field of :class:`Cell` summed over the branches of one decision."""
        return np.sum([getattr(cell, name) for cell in self.at(*where)], axis=0)  # type: ignore[no-any-return]

    def relative_error(self, where: tuple[int, str, int]) -> Floats:
        """Relative L2 error of each candidate's output in one decision, [C,H]."""
        return np.sqrt(self.total(where, "error") / np.maximum(self.total(where, "energy"), 1e-20))

    def add(self, key: str, samples: Mapping[Place, Sample]) -> None:
        """Takes one prompt in; ``key`` names it."""
        for place, sample in samples.items():
            if place not in self.cells:
                self.cells[place] = Cell.empty(*sample.error.shape)
            self.cells[place].add(sample)
        self.done.append(key)

    # -- the file -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        places = sorted(self.cells)
        heads = max((cell.error.shape[1] for cell in self.cells.values()), default=1)
        shape = (len(places), len(self.candidates), heads)
        tensors: dict[str, np.ndarray] = {name: np.full(shape, np.nan, np.float32) for name in FIELDS}
        tensors["energy"] = np.full((len(places), heads), np.nan, np.float32)
        for i, place in enumerate(places):
            cell = self.cells[place]
            for name in FIELDS:
                tensors[name][i, :, : cell.error.shape[1]] = getattr(cell, name)
            tensors["energy"][i, : cell.energy.shape[0]] = cell.energy
        tensors["place"] = np.array([_code(place) for place in places], np.int32).reshape(-1, 4)
        tensors["prompts"] = np.array([self.cells[place].prompts for place in places], np.int32)
        tensors["edges"] = np.array(self.edges, np.float64)
        weights = [(b, TRANSFORMERS.index(t), layer, w) for (b, t, layer), w in sorted(self.weight.items())]
        tensors["weight"] = np.array(weights, np.float64).reshape(-1, 4)
        meta = {
            "candidates": [policy_to_data(policy) for policy in self.candidates],
            "tile": None if self.tile is None else list(self.tile),
            "fingerprint": self.fingerprint.to_data(),
            **{
                name: getattr(self, name)
                for name in ("done", "settings", "times", "probes", "costs", "notes", "provenance")
            },
            "steps": list(self.steps),
            **({} if self.shape is None else {"shape": self.shape.to_dict()}),
            **({"caches": [run.to_dict() for run in self.caches]} if self.caches else {}),
            **({} if self.linears is None else {"linears": self.linears.to_dict()}),
        }
        _FILE.write(path, meta, tensors)

    @staticmethod
    def load(path: str | Path) -> Observations:
        """Reads the file.

        Raises:
            PlanFileError: if it is missing, truncated, damaged, or not of this kind and version.
        """
        return _FILE.load(path, _from_parts)

    def check_settings(self, settings: Mapping[str, Any], path: str | Path) -> None:
        """Raises :class:`ConfigError` unless a run with these settings may go on with these observations."""
        apart = {name for name in {*self.settings, *settings} if self.settings.get(name) != settings.get(name)}
        _refuse([_SETTINGS.get(name, name) for name in sorted(apart)], path)

    def check_same(self, other: Observations, path: str | Path) -> None:
        """Raises :class:`ConfigError` unless a run like ``other`` may go on with these observations."""
        self.check_settings(other.settings, path)
        names = {"candidates": "candidates", "tile": "tile", "fingerprint": "model or grid", "edges": "noise bins"}
        _refuse([what for name, what in names.items() if _plain(self, name) != _plain(other, name)], path)


#: What settings are called in messages.
_SETTINGS = {"arguments": "generation settings", "bins": "noise bins"}


def _refuse(apart: Sequence[str], path: str | Path) -> None:
    if apart:
        raise ConfigError(
            f"{path} holds observations of a run with other {', '.join(apart)}; use the same settings, or another"
            " --state file, or delete that one to begin anew"
        )


def _plain(of: Observations, name: str) -> Any:
    if name == "fingerprint":
        return replace(of.fingerprint, vidaccel=None)
    return tuple(round(edge, 6) for edge in of.edges) if name == "edges" else getattr(of, name)


def _code(place: Place) -> tuple[int, int, int, int]:
    branch = BRANCHES.index(place.branch) if place.branch else -1
    return place.bin, TRANSFORMERS.index(place.transformer), place.layer, branch


def _from_parts(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> Observations:
    take(meta, (*_META, "shape", "caches", "linears"), "its metadata")
    missing = [key for key in _META if key not in meta]
    if missing:
        raise PlanFileError(f"its metadata lacks {', '.join(missing)}; write it again")
    candidates = tuple(policy_from_data(data, f"candidate {i}") for i, data in enumerate(meta["candidates"]))
    edges = tuple(tensors["edges"].tolist()) if tensors["edges"].ndim == 1 else ()
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or any(not low < high for low, high in pairwise(edges)):
        raise PlanFileError("its noise bins do not ascend from 0 to 1; write it again")
    places = _places(tensors["place"], len(edges) - 1)
    energy_shape = tensors["energy"].shape
    shape = (len(places), len(candidates), energy_shape[-1] if energy_shape else 0)
    if (
        any(tensors[name].shape != shape for name in FIELDS)
        or energy_shape != (shape[0], shape[2])
        or tensors["prompts"].shape != (len(places),)
        or len(set(places)) != len(places)
        or len(places) * len(candidates) > _MOST_ROWS
    ):
        raise PlanFileError("its tensors do not fit together; write it again")
    cells = {}
    for i, place in enumerate(places):
        known = np.isfinite(tensors["energy"][i])
        heads = int(known.sum())
        if not known[:heads].all() or tensors["prompts"][i] < 0:  # unknown heads come last
            raise PlanFileError(f"its figures of {place} are not those of some heads; write it again")
        parts = {name: np.ascontiguousarray(tensors[name][i, :, :heads]) for name in FIELDS}
        if not all(np.isfinite(part).all() for part in parts.values()):
            raise PlanFileError(f"its figures of {place} are not finite; write it again")
        energy = np.ascontiguousarray(tensors["energy"][i, :heads])
        cells[place] = Cell(prompts=int(tensors["prompts"][i]), energy=energy, **parts)
    return Observations(
        candidates=candidates,
        tile=tile_from_data(meta["tile"]),
        fingerprint=Fingerprint.from_data(meta["fingerprint"]),
        edges=edges,
        steps=_numbers(meta["steps"], len(edges) - 1),
        settings=_mapping(meta["settings"], "settings"),
        cells=cells,
        weight=_weights(tensors["weight"], len(edges) - 1),
        done=_texts(meta["done"], "prompts"),
        times={key: float(value) for key, value in _mapping(meta["times"], "times").items()},
        probes=[_mapping(probe, "probes") for probe in meta["probes"]],
        costs=_mapping(meta["costs"], "costs"),
        notes=_texts(meta["notes"], "notes"),
        provenance=dict(zip(meta["provenance"], _texts(list(meta["provenance"].values()), "provenance"), strict=True)),
        shape=Shape.from_dict(meta["shape"]) if "shape" in meta else None,
        caches=[CacheRun.from_dict(run) for run in meta.get("caches", [])],
        linears=LinearTable.from_dict(meta["linears"], len(edges) - 1) if "linears" in meta else None,
    )


def _places(codes: np.ndarray, bins: int) -> list[Place]:
    if codes.ndim != 2 or codes.shape[1] != 4:
        raise PlanFileError("its table of places has not four columns; write it again")
    found = []
    for b, t, layer, branch in codes.tolist():
        if not (0 <= b < bins and 0 <= t < len(TRANSFORMERS) and layer >= 0 and -1 <= branch < len(BRANCHES)):
            raise PlanFileError("its table of places holds codes that mean nothing; write it again")
        found.append(Place(b, TRANSFORMERS[t], layer, "" if branch < 0 else BRANCHES[branch]))
    return found


def _weights(table: np.ndarray, bins: int) -> dict[tuple[int, str, int], float]:
    rows = table.ndim == 2 and table.shape[1] == 4 and bool(np.isfinite(table).all())
    if not rows or (table[:, :3] != np.trunc(table[:, :3])).any():
        raise PlanFileError("its table of weights has not three whole numbers and a weight a row; write it again")
    found = {}
    for b, t, layer, w in table.tolist():
        if not (0 <= b < bins and 0 <= t < len(TRANSFORMERS) and 0 <= layer < 1 << 31 and w >= 0):
            raise PlanFileError("its table of weights holds codes that mean nothing; write it again")
        found[(int(b), TRANSFORMERS[int(t)], int(layer))] = float(w)
    if len(found) != len(table):
        raise PlanFileError("its table of weights names a place twice; write it again")
    return found


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise PlanFileError(f"its {what} are no list of texts; write it again")
    return list(values)


def _mapping(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise PlanFileError(f"its {what} are no mapping; write it again")
    return dict(values)


def _numbers(values: Sequence[Any], count: int) -> tuple[int, ...]:
    if len(values) != count or not all(type(v) is int and v >= 0 for v in values):
        raise PlanFileError(f"its steps are {values!r}; valid are {count} whole numbers; write it again")
    return tuple(values)
