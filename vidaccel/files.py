"""Output files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .errors import OutputError

__all__ = ["atomic_path", "check_folder", "check_writable", "finished_files", "write_json"]

_FINISHED: ContextVar[list[Path] | None] = ContextVar("vidaccel_finished_files", default=None)


def _temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the folder of ``path`` with the same suffix, since writers choose the format by it."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.partial{path.suffix}")


def _explain(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error) or type(error).__name__
    return OutputError(f"cannot write {path}: {reason}; choose another output path or free the disk")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Prove, before any work is done, that a file can be written at ``path``; returns it as a `Path`.

    A probe file is made and removed, since permission bits alone say little (read-only mounts, root, quotas).

    Raises:
        OutputError: the folder is missing or cannot be written to, or ``path`` is itself a folder.
    """
    target = Path(path)
    if not target.name or target.is_dir():
        raise OutputError(f"the output {target} is a folder; name a file in it")
    if not target.parent.exists():
        raise OutputError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: {target.parent} is not a folder; choose another output path")
    probe = _temporary_beside(target)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise _explain(target, error) from error
    finally:
        probe.unlink(missing_ok=True)
    return target


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Prove, before any work is done, that files can be written into the folder ``path``, which need not exist yet.

    It is not made: a refused command leaves nothing behind, and other processes may look at the same time.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    folder = Path(path).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise OutputError(f"cannot make the folder {folder}: {there} is not a folder; choose another output")
    try:
        check_writable(there / "probe")
    except OutputError as error:
        raise OutputError(f"cannot write into the folder {folder}: {error}") from error
    return Path(path)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; it takes the place of ``path`` once the block has ended well.

    If the block raises, KeyboardInterrupt included, the temporary file is removed and an existing file at ``path``
    stays as it was. Do nothing but the writing in the block: an ``OSError`` in it is reported as that of ``path``.

    Raises:
        OutputError: the file cannot be written there.
    """
    target = check_writable(path)
    temporary = _temporary_beside(target)
    try:
        yield temporary
        os.replace(temporary, target)
        _note(target)
    except OutputError:
        raise
    except OSError as error:
        raise _explain(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def finished_files() -> Iterator[list[Path]]:
    """Yield a list that grows by each file written in the block, so that an interrupted run can say what it left."""
    token = _FINISHED.set([])
    try:
        found = _FINISHED.get()
        assert found is not None
        yield found
    finally:
        _FINISHED.reset(token)


def _note(path: Path) -> None:
    found = _FINISHED.get()
    if found is not None and path not in found:
        found.append(path)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all; infinite and NaN figures are written as strings.

    Raises:
        OutputError: the file cannot be written there.
    """
    text = json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """``value`` with floats that JSON has no word for ("inf", "nan") as strings."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
