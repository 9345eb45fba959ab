"""Seeded damage and forgery of our ``.safetensors`` files.

Three kinds of wrong file, by what a loader owes them:

``same``
    bytes changed by accident: cut, flipped, moved. Refused, or the original content.
``refuse``
    nothing a writer of ours would ever write. Refused.
``other``
    one thing changed and the checksum made right again, as a malicious writer would. Refused, or taken exactly as it
    stands: content that is not the original's, and that survives being written and read again.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from vidaccel.configs.sealed import Sealed

__all__ = ["Mutation", "mutations"]

Owed = Literal["same", "refuse", "other"]
Tensors = dict[str, np.ndarray]

#: What a field may be replaced by; texts among them that try to leave a folder, a line, a terminal or a table.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, "", " ", "x" * 5000),
    *("../../etc/passwd", "/dev/zero", "a\0b", "a\nb", "\x1b[2J", "\u202etxt", "\u00e9" * 50, "dense"),
    *("__import__('os')", "!!python/object", [], {}, [[]], [None], [0] * 70, {"name": "dense"}),
    {"a": {"b": {"c": {"d": {"e": {}}}}}},
)

#: Pieces of JSON that no writer of ours makes, to stand where a value stood.
RAW = {
    "deep list": "[" * 3000 + "]" * 3000,
    "deep mapping": '{"a":' * 3000 + "1" + "}" * 3000,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "number beyond floats": "1e999",
    "number of 5000 digits": "9" * 5000,
    "half a character": '"\\ud800"',
}


@dataclass(frozen=True)
class Mutation:
    """One wrong file.

    Args:
        name: what was done to it.
        owed: what a loader owes it.
        raw: its bytes.
        counts: whether the content was really changed, so that loading the original's would be to ignore it.
    """

    name: str
    owed: Owed
    raw: bytes
    counts: bool = False


def mutations(file: Sealed, path: Path, count: int, seed: int) -> Iterator[Mutation]:
    """``count`` wrong files made from the good one at ``path``; the same for the same seed."""
    forge = _Forge(file, path)
    makers: tuple[Callable[[random.Random], Mutation], ...] = (
        forge.damage, forge.field, forge.tensor, forge.damage, forge.header, forge.field, forge.raw_json, forge.field,
    )  # fmt: skip
    for number in range(count):
        yield makers[number % len(makers)](random.Random(f"{seed}-{number}"))


class _Forge:
    """A good file, taken apart and put together wrong."""

    def __init__(self, file: Sealed, path: Path) -> None:
        self.file, self.good = file, path.read_bytes()
        with safe_open(path, framework="np") as opened:
            self.meta: dict[str, Any] = json.loads(opened.metadata()["vidaccel"])
            self.tensors: Tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self.meta.pop("sha256")

    def signed(self, meta: dict[str, Any], tensors: Tensors) -> bytes:
        """A file of these parts with a right checksum, as far as one can be made."""
        try:
            meta = {**meta, "sha256": self.file._digest(meta, tensors)}
        except (KeyError, ValueError):  # a tensor is missing, or a text cannot be sealed
            meta = {**meta, "sha256": "0" * 64}
        return save(tensors, {"vidaccel": json.dumps(meta)})

    # -- by accident --------------------------------------------------------------------------------------------

    def damage(self, draw: random.Random) -> Mutation:
        """Bytes cut, flipped, overwritten, moved, added or doubled."""
        raw = bytearray(self.good)
        header = 8 + int.from_bytes(raw[:8], "little")
        kind = draw.choice(
            ["cut", "flip", "flips", "digit", "overwrite", "splice", "swap", "append", "twice", "zeros", "length"]
        )
        if kind == "cut":
            del raw[draw.randrange(len(raw)) :]
        elif kind in ("flip", "flips"):
            for _ in range(1 if kind == "flip" else draw.randrange(2, 40)):
                raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        elif kind == "digit":  # offsets, shapes and numbers stay well formed
            digits = [i for i, byte in enumerate(raw[:header]) if chr(byte).isdigit()]
            raw[draw.choice(digits)] = ord(draw.choice("0123456789"))
        elif kind == "overwrite":
            begin, length = draw.randrange(len(raw)), draw.randrange(1, 200)
            raw[begin : begin + length] = draw.randbytes(min(length, len(raw) - begin))
        elif kind == "splice":
            begin = draw.randrange(len(raw))
            raw[begin : begin + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        elif kind == "swap":
            a, b = sorted(draw.sample(range(len(raw) - 16), 2))
            raw[a : a + 8], raw[b : b + 8] = raw[b : b + 8], raw[a : a + 8]
        elif kind == "append":
            raw += draw.randbytes(draw.randrange(1, 300))
        elif kind == "twice":
            raw += bytes(raw)
        elif kind == "zeros":
            begin = draw.randrange(len(raw))
            raw[begin:] = bytes(len(raw) - begin)
        else:  # the header claims another length
            claims = [0, 1, header - 9, header - 7, len(raw), 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 48, (1 << 64) - 1]
            raw[:8] = draw.choice(claims).to_bytes(8, "little")
        return Mutation(f"damage: {kind}", "same", bytes(raw))

    # -- on purpose ---------------------------------------------------------------------------------------------

    def field(self, draw: random.Random) -> Mutation:
        """One place of the metadata replaced, removed, renamed, added to or doubled."""
        meta = copy.deepcopy(self.meta)
        holder, key = draw.choice(list(_places(meta)))
        kind = draw.choice(["replace", "replace", "replace", "remove", "rename", "add", "double"])
        where, counts = f"metadata {key!r}", False
        if kind == "replace":
            value = draw.choice(VALUES)
            # a bare name is another spelling of a spec without parameters
            counts = json.dumps(value) not in (json.dumps(holder[key]), json.dumps(_bare(holder[key])))
            holder[key] = copy.deepcopy(value)
            where += f" -> {str(value)[:30]!r}"
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw.choice(["extra", "", "../name", "__class__", "name "])] = holder[key]
            if kind == "rename":
                del holder[key]
        else:
            holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        return Mutation(f"{kind}: {where}", "other", self.signed(meta, self.tensors), counts)

    def tensor(self, draw: random.Random) -> Mutation:
        """One tensor with other values, another dtype or another shape, or one too many or too few."""
        tensors = dict(self.tensors)
        name = draw.choice(sorted(tensors))
        x = tensors[name]
        kind = draw.choice(["value", "value", "value", "dtype", "axis", "grow", "shrink", "flatten", "gone", "more"])
        counts, what = kind == "value", f"{kind}: tensor {name}"
        if kind == "value":
            if not x.size:
                return Mutation(what, "same", self.signed(self.meta, tensors))
            extremes = [-1, 0, 1, 7, 1 << 30, -(1 << 31), (1 << 31) - 1]
            value = draw.choice([*extremes, np.nan, np.inf, -np.inf, 1e30, 0.5] if x.dtype.kind == "f" else extremes)
            changed = x.copy()
            place = draw.randrange(x.size)
            changed.reshape(-1)[place] = value
            counts = changed.tobytes() != x.tobytes()
            tensors[name], what = changed, f"{what}[{place}] = {value}"
        elif kind == "dtype":
            others = [
                d for d in (np.int8, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_) if d != x.dtype
            ]
            with np.errstate(invalid="ignore"):
                tensors[name] = x.astype(draw.choice(others))
            return Mutation(what, "refuse", self.signed(self.meta, tensors))
        elif kind == "axis":
            tensors[name] = x[None]
        elif kind == "grow":
            tensors[name] = (
                np.concatenate([x.reshape(-1)] * draw.choice([2, 3, 1000])) if x.size else np.zeros(5, x.dtype)
            )
        elif kind == "shrink":
            tensors[name] = x.reshape(-1)[: x.size // 2].copy()
        elif kind == "flatten":
            tensors[name] = x.reshape(-1).copy()
        elif kind == "gone":
            del tensors[name]
            return Mutation(what, "refuse", self.signed(self.meta, tensors))
        else:
            tensors[draw.choice(["more", "../../x", "/abs", "a\0b", "x" * 1000])] = x
            return Mutation(what, "refuse", self.signed(self.meta, tensors))
        return Mutation(what, "other", self.signed(self.meta, tensors), counts)

    def header(self, draw: random.Random) -> Mutation:
        """The container's own header lies about a tensor: its type, its shape or where it lies."""
        size = int.from_bytes(self.good[:8], "little")
        header, body = json.loads(self.good[8 : 8 + size]), self.good[8 + size :]
        name = draw.choice(sorted(set(header) - {"__metadata__"}))
        entry = header[name]
        kind = draw.choice(["shape", "offsets", "dtype", "rename", "metadata"])
        if kind == "shape":
            entry["shape"] = draw.choice(
                [[], [0], [-1], [1 << 62, 4], [0, 1 << 62], [1 << 40], [1] * 100, ["3"], None, [2.5], [1 << 70]]
            )
        elif kind == "offsets":
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = draw.choice(
                [[end, begin], [begin, end + 4], [begin, 1 << 60], [-8, end], [0, len(body)], [begin], None, [0, 0]]
            )
        elif kind == "dtype":
            entry["dtype"] = draw.choice(["F64", "I64", "U8", "BF16", "F8_E4M3", "O", "object", "", None, 3])
        elif kind == "rename":
            header[draw.choice(["../../x", "", "x" * 3000, "__metadata__ "])] = header.pop(name)
        else:
            header["__metadata__"] = draw.choice(
                [None, {}, {"vidaccel": 1}, {"vidaccel": ""}, {"a": "b"}, "vidaccel", []]
            )
        text = json.dumps(header).encode()
        return Mutation(f"header: {kind} of {name}", "same", len(text).to_bytes(8, "little") + text + body)

    def raw_json(self, draw: random.Random) -> Mutation:
        """Metadata that is no JSON of ours: too deep, not finite, a key twice, or not the text of a mapping."""
        if draw.random() < 0.3:
            text = draw.choice(
                ["", "null", "[]", "1", "{", '"vidaccel"', "{} {}", "\ufeff{}", "[" * 100_000, "{'a': 1}"]
            )
            return Mutation(f"metadata is {text[:10]!r}", "refuse", save(self.tensors, {"vidaccel": text}))
        meta = copy.deepcopy(self.meta)
        if draw.random() < 0.3:
            key = draw.choice(sorted(meta))
            text = json.dumps({**meta, "sha256": self.file._digest(meta, self.tensors)})
            text = "{" + f"{json.dumps(key)}: {json.dumps(draw.choice(VALUES))}, " + text[1:]
            return Mutation(f"metadata has {key} twice", "refuse", save(self.tensors, {"vidaccel": text}))
        holder, key = draw.choice(list(_places(meta)))
        name = draw.choice(sorted(RAW))
        holder[key] = "@here@"
        text = json.dumps({**meta, "sha256": "0" * 64}).replace('"@here@"', RAW[name])
        return Mutation(f"metadata {key!r} is {name}", "refuse", save(self.tensors, {"vidaccel": text}))


def _bare(value: Any) -> Any:
    return value["name"] if isinstance(value, dict) and set(value) == {"name"} else value


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every place below a mapping or list."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])
