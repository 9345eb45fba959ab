"""A plan in one ``.safetensors`` file.

Metadata key ``vidaccel`` holds JSON: format version, name, tile, fingerprint, provenance, the step cache and
the precisions of Linears if there are any, a palette of distinct head policies, and a SHA-256 of everything. The rules
are tensors (R rules):

====================  =======  ==========================================================================
``noise``             [R, 2]   float64, bounds (low, high]
``transformer``       [R]      int32, index into ``TRANSFORMERS``, -1 for any
``branch``            [R]      int32, index into ``BRANCHES``, -1 for any
``layers``            [.]      int32, layer numbers of all rules, one after the other
``layers_offsets``    [R + 1]  int32, where each rule's layers begin; an empty range means every layer
``heads``             [.]      int32, indices into the palette, one after the other
``heads_offsets``     [R + 1]  int32, where each rule's heads begin
====================  =======  ==========================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PlanFileError
from .codec import policy_from_data, policy_to_data, take, tile_from_data
from .fingerprint import Fingerprint
from .linear import linear_from_data, linear_to_data
from .plan import BRANCHES, TRANSFORMERS, HeadPolicy, LayerPolicy, Plan, Rule
from .sealed import Sealed

__all__ = ["FORMAT_VERSION", "load_plan", "save_plan"]

#: Raised by one whenever a file of the new form cannot be read by the code before it.
FORMAT_VERSION = 1

_FILE = Sealed(
    kind="plan",
    version=FORMAT_VERSION,
    writer="save_plan or calibrate",
    tensors={
        "noise": np.float64,
        "transformer": np.int32,
        "branch": np.int32,
        "layers": np.int32,
        "layers_offsets": np.int32,
        "heads": np.int32,
        "heads_offsets": np.int32,
    },
    # a Wan 2.2 plan with a policy per phase, layer, head and branch has 0.3 MB; in memory a rule takes 20 times as much
    max_bytes=2 << 20,
)
_META_KEYS = ("name", "tile", "fingerprint", "provenance", "palette")
_OPTIONAL_KEYS = ("cache", "linear")


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan; the file appears whole or not at all.

    Raises:
        OutputError: if it cannot be written.
        ConfigError: if the plan is larger than a plan file may be.
    """
    tensors, palette = _to_tensors(plan)
    meta = {
        "name": plan.name,
        "tile": None if plan.tile is None else list(plan.tile),
        "fingerprint": None if plan.fingerprint is None else plan.fingerprint.to_data(),
        "provenance": dict(plan.provenance),
        "palette": [policy_to_data(policy) for policy in palette],
    }
    if plan.cache is not None:
        meta["cache"] = plan.cache
    if plan.linear is not None:
        meta["linear"] = linear_to_data(plan.linear)
    _FILE.write(path, meta, tensors)


def load_plan(path: str | Path) -> Plan:
    """Reads a plan.

    Raises:
        PlanFileError: if the file is missing, truncated, damaged, not a plan, or of another format version.
    """
    if Path(path).suffix.lower() != ".safetensors" and not Path(path).exists():
        raise PlanFileError(
            f"there is no plan file {path}, and plan files end in .safetensors; a preset is read by"
            " load_preset(name), and patch(pipe, name) takes either"
        )
    return _FILE.load(
        path, lambda meta, tensors: _to_plan(take(meta, (*_META_KEYS, *_OPTIONAL_KEYS), "its metadata"), tensors)
    )


def _to_tensors(plan: Plan) -> tuple[dict[str, np.ndarray], list[HeadPolicy]]:
    palette: dict[HeadPolicy, int] = {}
    heads = [[palette.setdefault(head, len(palette)) for head in rule.policy.heads] for rule in plan.rules]
    layers = [rule.layers or () for rule in plan.rules]
    tensors = {
        "noise": np.array([rule.noise for rule in plan.rules], np.float64).reshape(-1, 2),
        "transformer": _codes([rule.transformer for rule in plan.rules], TRANSFORMERS),
        "branch": _codes([rule.branch for rule in plan.rules], BRANCHES),
    }
    for name, parts in (("layers", layers), ("heads", heads)):
        tensors[name] = np.array([number for part in parts for number in part], np.int32)
        tensors[f"{name}_offsets"] = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    return tensors, list(palette)


def _codes(found: Iterable[str | None], names: tuple[str, ...]) -> np.ndarray:
    return np.array([-1 if name is None else names.index(name) for name in found], np.int32)


def _to_plan(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> Plan:
    missing = [key for key in _META_KEYS if key not in meta]
    if missing:
        raise PlanFileError(f"its metadata lacks {', '.join(missing)}; write it again")
    rules = tensors["noise"].size // 2
    if tensors["noise"].shape != (rules, 2):
        raise PlanFileError(f"tensor noise has shape {tensors['noise'].shape}; valid is [rules, 2]")
    if not isinstance(meta["palette"], list) or not isinstance(meta["provenance"], dict):
        raise PlanFileError("its palette is no list or its provenance no mapping; write it again")
    palette = [policy_from_data(policy, f"palette entry {i}") for i, policy in enumerate(meta["palette"])]
    transformers = _names(tensors["transformer"], TRANSFORMERS, rules, "transformer")
    branches = _names(tensors["branch"], BRANCHES, rules, "branch")
    layers = _parts(tensors["layers"], tensors["layers_offsets"], rules, "layers")
    heads = _parts(tensors["heads"], tensors["heads_offsets"], rules, "heads")
    if tensors["heads"].size and not 0 <= tensors["heads"].min() <= tensors["heads"].max() < len(palette):
        raise PlanFileError(f"tensor heads points outside its {len(palette)} policies; write it again")
    unused = len(palette) - np.unique(tensors["heads"]).size
    if unused:
        raise PlanFileError(f"{unused} policies of its palette are used by no head; write it again")
    fingerprint = meta["fingerprint"]
    return Plan(
        name=meta["name"],
        rules=tuple(
            Rule(
                LayerPolicy(tuple(palette[code] for code in heads[i])),
                noise=(float(tensors["noise"][i, 0]), float(tensors["noise"][i, 1])),
                transformer=transformers[i],
                layers=tuple(layers[i]) or None,
                branch=branches[i],
            )
            for i in range(rules)
        ),
        tile=tile_from_data(meta["tile"]),
        fingerprint=None if fingerprint is None else Fingerprint.from_data(fingerprint),
        provenance=tuple(meta["provenance"].items()),
        cache=meta.get("cache"),
        linear=linear_from_data(meta.get("linear")),
    )


def _names(codes: np.ndarray, names: tuple[str, ...], rules: int, what: str) -> list[str | None]:
    if codes.shape != (rules,) or (rules and not -1 <= codes.min() <= codes.max() < len(names)):
        raise PlanFileError(f"tensor {what} is not {rules} codes from -1 to {len(names) - 1}; write it again")
    return [None if code < 0 else names[code] for code in codes.tolist()]


def _parts(values: np.ndarray, offsets: np.ndarray, rules: int, what: str) -> list[list[int]]:
    fits = offsets.shape == (rules + 1,) and values.ndim == 1
    if not fits or offsets[0] != 0 or offsets[-1] != values.size or (np.diff(offsets) < 0).any():
        raise PlanFileError(f"tensors {what} and {what}_offsets do not fit together; write it again")
    return [values[begin:end].tolist() for begin, end in itertools.pairwise(offsets.tolist())]
