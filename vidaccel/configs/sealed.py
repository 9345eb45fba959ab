"""Our ``.safetensors`` files: tensors, one JSON text that describes them, and a checksum over both.

Nothing in a file is ever executed. A loader meets strangers' files, so sizes are bounded before anything is parsed,
any changed byte is found, and whatever else is wrong ends in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import ConfigError, PlanFileError
from ..files import atomic_path

__all__ = ["Sealed"]

_MAX_HEADER_BYTES = 1 << 20
_MAX_MESSAGE = 400  # a hostile value may be quoted in a message
_TYPES = {"F64": np.float64, "F32": np.float32, "I32": np.int32, "I64": np.int64}
_NAMES = {np.dtype(dtype): name for name, dtype in _TYPES.items()}

Tensors = dict[str, np.ndarray]
_T = TypeVar("_T")

#: What parsing and reading data of the wrong form raises; :class:`ConfigError` is a ``ValueError``.
_WRONG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Sealed:
    """One kind of file.

    Args:
        kind: what the file is, in one word; stored in it.
        version: raised by one whenever a new file cannot be read by the code before it.
        writer: the command or function that writes such files, for error messages.
        tensors: name -> dtype of each tensor that a file has.
        max_bytes: size above which a file is not opened.
    """

    kind: str
    version: int
    writer: str
    tensors: Mapping[str, Any]
    max_bytes: int

    def write(self, path: str | Path, meta: Mapping[str, Any], tensors: Tensors) -> None:
        """Writes a file; it appears whole or not at all.

        Raises:
            OutputError: if it cannot be written.
            ConfigError: if it is larger than such a file may be.
        """
        described = {"kind": self.kind, "format": self.version, **meta}
        sealed = {**described, "sha256": self._digest(described, tensors)}
        raw = save(tensors, {"vidaccel": json.dumps(sealed, sort_keys=True, allow_nan=False)})
        if int.from_bytes(raw[:8], "little") > _MAX_HEADER_BYTES or len(raw) > self.max_bytes:
            raise ConfigError(f"the {self.kind} is too large for a {self.kind} file; make it of fewer distinct entries")
        with atomic_path(path) as temporary:
            temporary.write_bytes(raw)

    def load(self, path: str | Path, build: Callable[[dict[str, Any], Tensors], _T]) -> _T:
        """What ``build`` makes of the metadata and the tensors, once they match the checksum.

        A right checksum proves nothing about a stranger's file, so whatever ``build`` stumbles over is an error too.

        Raises:
            PlanFileError: if the file is missing, truncated, damaged, of another kind or version, or its content is
                of a form that ``build`` cannot read.
        """
        path = Path(path)
        try:
            return build(*self.read(path))
        except RecursionError:
            raise PlanFileError(f"{path} is not a usable {self.kind}: its metadata is nested too deep") from None
        except _WRONG as error:
            told = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            already = isinstance(error, PlanFileError) and told.startswith(str(path))
            raise PlanFileError(told if already else self._unusable(path, told)) from None

    def read(self, path: Path) -> tuple[dict[str, Any], Tensors]:
        """Metadata and tensors, checked against the checksum; what they mean is the caller's to check.

        Raises:
            PlanFileError: if the file is missing, truncated, damaged, of another kind or version.
        """
        try:
            self._check_sizes(path)
            with safe_open(path, framework="np") as file:
                text = (file.metadata() or {}).get("vidaccel")
                if text is None:
                    raise PlanFileError(f"it has no vidaccel metadata; give a file written by {self.writer}")
                meta = self._meta(text)
                if set(file.keys()) != set(self.tensors):
                    raise PlanFileError(f"its tensors are not {', '.join(self.tensors)}; write it again")
                for name, dtype in self.tensors.items():  # before any data is read: the file may lie about its types
                    found = file.get_slice(name).get_dtype()
                    if found != _NAMES[np.dtype(dtype)]:
                        raise PlanFileError(f"tensor {name} has type {found}; write the file again")
                tensors = {name: file.get_tensor(name) for name in self.tensors}
            if meta.pop("sha256", None) != self._digest(meta, tensors):
                raise PlanFileError(
                    "its content does not match its checksum, so it was changed or damaged; copy it again"
                )
            return {key: value for key, value in meta.items() if key not in ("kind", "format")}, tensors
        except FileNotFoundError:
            raise PlanFileError(f"there is no {self.kind} file {path}; check the path") from None
        except OSError as error:
            raise PlanFileError(f"{path} cannot be read: {error.strerror or error}; give a file that can be") from None
        except SafetensorError as error:
            reason = str(error).splitlines()[0] if str(error) else "unknown reason"
            reason = reason[:_MAX_MESSAGE]
            raise PlanFileError(f"{path} is truncated, damaged or not a .safetensors file ({reason})") from None
        except RecursionError:
            raise PlanFileError(f"{path} is not a usable {self.kind}: its metadata is nested too deep") from None
        except _WRONG as error:  # hostile JSON or numbers
            raise PlanFileError(self._unusable(path, str(error))) from None

    def _unusable(self, path: Path, reason: str) -> str:
        line = " ".join(reason.split())
        short = line if len(line) <= _MAX_MESSAGE else line[: _MAX_MESSAGE - 3] + "..."
        return f"{path} is not a usable {self.kind}: {short}"

    def _check_sizes(self, path: Path) -> None:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # a pipe would be waited for
            raise PlanFileError("it is a device, a pipe or a socket; give a file")
        size = found.st_size
        if size > self.max_bytes:
            raise PlanFileError(
                f"it has {size} bytes, more than the {self.max_bytes} of any {self.kind}; is it a model?"
            )
        with path.open("rb") as file:
            start = file.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8 or header > size - 8:
            raise PlanFileError(f"it has {size} bytes and is truncated, or no .safetensors file; copy it again")
        if header > _MAX_HEADER_BYTES:
            raise PlanFileError(f"its header has {header} bytes, more than the {_MAX_HEADER_BYTES} of any {self.kind}")

    def _meta(self, text: str) -> dict[str, Any]:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once_each)
        version = found.get("format") if isinstance(found, dict) else None
        if type(version) is not int or version != self.version:  # True and 1.0 are equal to 1
            raise PlanFileError(
                f"its format version is {str(version)[:20]}, this vidaccel reads {self.version};"
                " write it again or update"
            )
        if found.get("kind") != self.kind:
            raise PlanFileError(f"it is no {self.kind}: its kind is {str(found.get('kind'))[:20]}")
        return dict(found)

    def _digest(self, meta: Mapping[str, Any], tensors: Tensors) -> str:
        try:
            json.dumps(meta, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can say it, but no terminal or file can show it
            raise ConfigError("its texts hold half a character (a lone surrogate); write whole ones") from None
        digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode("ascii"))
        for name in self.tensors:
            digest.update(f"{name}{tensors[name].shape}".encode())
            digest.update(np.ascontiguousarray(tensors[name]).tobytes())
        return digest.hexdigest()


def _refuse(number: str) -> None:
    raise PlanFileError(f"its metadata holds {number[:20]}; numbers must be finite")


def _finite(number: str) -> float:
    found = float(number)
    if not math.isfinite(found):  # 1e999 is a number to JSON and infinity to Python
        _refuse(number)
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # two readers might take different ones
        raise PlanFileError("its metadata names a key twice; write it again")
    return found
