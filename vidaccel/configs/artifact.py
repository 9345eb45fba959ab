"""A plan in one ``.safetensors`` file.

Metadata key ``vidaccel`` holds JSON: format version, name, tile, fingerprint, provenance, a palette of distinct head
policies, and a SHA-256 of everything. The rules are tensors (R rules):

====================  =======  ==========================================================================
``noise``             [R, 2]   float64, bounds (low, high]
``transformer``       [R]      int32, index into ``TRANSFORMERS``, -1 for any
``branch``            [R]      int32, index into ``BRANCHES``, -1 for any
``layers``            [.]      int32, layer numbers of all rules, one after the other
``layers_offsets``    [R + 1]  int32, where each rule's layers begin; an empty range means every layer
``heads``             [.]      int32, indices into the palette, one after the other
``heads_offsets``     [R + 1]  int32, where each rule's heads begin
====================  =======  ==========================================================================

Nothing in a file is ever executed. A loader meets strangers' files, so sizes are bounded before anything is parsed
and any changed byte is found.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import ConfigError, PlanFileError
from ..files import atomic_path
from .codec import policy_from_data, policy_to_data, take, tile_from_data
from .fingerprint import Fingerprint
from .plan import BRANCHES, TRANSFORMERS, HeadPolicy, LayerPolicy, Plan, Rule

__all__ = ["FORMAT_VERSION", "load_plan", "save_plan"]

#: Raised by one whenever a file of the new form cannot be read by the code before it.
FORMAT_VERSION = 1

_MAX_FILE_BYTES = 16 << 20  # a Wan 2.2 plan with a policy per phase, layer, head and branch has 0.3 MB
_MAX_HEADER_BYTES = 1 << 20
_TENSORS = {
    "noise": np.float64,
    "transformer": np.int32,
    "branch": np.int32,
    "layers": np.int32,
    "layers_offsets": np.int32,
    "heads": np.int32,
    "heads_offsets": np.int32,
}
_META_KEYS = ("kind", "format", "name", "tile", "fingerprint", "provenance", "palette", "sha256")


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan; the file appears whole or not at all.

    Raises:
        OutputError: if it cannot be written.
        ConfigError: if the plan is larger than a plan file may be.
    """
    tensors, palette = _to_tensors(plan)
    meta = {
        "kind": "plan",
        "format": FORMAT_VERSION,
        "name": plan.name,
        "tile": None if plan.tile is None else list(plan.tile),
        "fingerprint": None if plan.fingerprint is None else plan.fingerprint.to_data(),
        "provenance": dict(plan.provenance),
        "palette": [policy_to_data(policy) for policy in palette],
    }
    text = json.dumps({**meta, "sha256": _digest(meta, tensors)}, sort_keys=True, allow_nan=False)
    raw = save(tensors, {"vidaccel": text})
    if int.from_bytes(raw[:8], "little") > _MAX_HEADER_BYTES or len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"plan {plan.name!r} has too many rules or distinct policies for a plan file; merge some")
    with atomic_path(path) as temporary:
        temporary.write_bytes(raw)


def load_plan(path: str | Path) -> Plan:
    """Reads a plan.

    Raises:
        PlanFileError: if the file is missing, truncated, damaged, not a plan, or of another format version.
    """
    path = Path(path)
    try:
        _check_sizes(path)
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("vidaccel")
            if text is None:
                raise PlanFileError("it has no vidaccel metadata; give a file written by save_plan or calibrate")
            if set(file.keys()) != set(_TENSORS):
                raise PlanFileError(f"its tensors are not {', '.join(_TENSORS)}; write it again")
            for name, dtype in _TENSORS.items():  # before any data is read: the file may lie about its types
                found = file.get_slice(name).get_dtype()
                if found != {np.float64: "F64", np.int32: "I32"}[dtype]:
                    raise PlanFileError(f"tensor {name} has type {found}; write the file again")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        return _to_plan(_read_meta(text), tensors)
    except FileNotFoundError:
        raise PlanFileError(f"there is no plan file {path}; check the path") from None
    except OSError as error:
        raise PlanFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown reason"
        raise PlanFileError(f"{path} is truncated, damaged or not a .safetensors file ({reason})") from None
    except RecursionError:
        raise PlanFileError(f"{path} is not a usable plan: its metadata is nested too deep") from None
    except (ValueError, TypeError) as error:  # ConfigError is a ValueError; the rest is hostile JSON or numbers
        raise PlanFileError(f"{path} is not a usable plan: {error}") from None


def _check_sizes(path: Path) -> None:
    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise PlanFileError(f"it has {size} bytes, more than the {_MAX_FILE_BYTES} of any plan; is it a model?")
    with path.open("rb") as file:
        start = file.read(8)
    header = int.from_bytes(start, "little")
    if len(start) < 8 or header > size - 8:
        raise PlanFileError(f"it has {size} bytes and is truncated, or no .safetensors file; copy it again")
    if header > _MAX_HEADER_BYTES:
        raise PlanFileError(f"its header has {header} bytes, more than the {_MAX_HEADER_BYTES} of any plan")


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


def _digest(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode("ascii"))
    for name in _TENSORS:
        digest.update(f"{name}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _read_meta(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise PlanFileError(f"its metadata holds {constant}; numbers must be finite")

    found = json.loads(text, parse_constant=refuse)
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise PlanFileError(
            f"its format version is {str(version)[:20]}, this vidaccel reads {FORMAT_VERSION}; write it again or update"
        )
    return take(found, _META_KEYS, "its metadata")


def _to_plan(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> Plan:
    missing = [key for key in _META_KEYS if key not in meta]
    if missing or meta["kind"] != "plan":
        raise PlanFileError(f"its metadata lacks {', '.join(missing) or 'kind: plan'}; write it again")
    if meta.pop("sha256") != _digest(meta, tensors):
        raise PlanFileError("its content does not match its checksum, so it was changed or damaged; copy it again")
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
