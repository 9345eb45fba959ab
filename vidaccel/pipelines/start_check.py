"""A strict session looks, when its pipeline is called, whether what was patched is what runs.

A transformer that took the place of a patched one has no hook of ours, so the look is where a pipeline begins: in the
methods that it calls on itself before its first step, set on the instance, or in the blocks of a modular pipeline.
"""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

from ..engine.attachment import NotPickled
from ..engine.session import Session
from ..errors import StrictError

__all__ = ["check_starts"]

#: Methods that diffusers' pipelines call on themselves before the first step.
_METHODS = ("check_inputs", "progress_bar")
_BLOCKS = "_blocks"


def check_starts(pipe: Any, session: Session) -> None:
    """Lets a strict session look at every start of its pipeline; undone when it closes."""
    if not session.strict:
        return
    if _BLOCKS in pipe.__dict__:
        _set(pipe, _BLOCKS, _checked_blocks(pipe.__dict__[_BLOCKS], session), session)
    for name in _METHODS:
        if callable(getattr(type(pipe), name, None)) and name not in pipe.__dict__:
            _set(pipe, name, _CheckedMethod(name, session), session)


def _check(pipe: Any, session: Session) -> None:
    """Raises :class:`StrictError` if the pipeline is the patched one and has another transformer by now."""
    if pipe is not session.pipe or session.closed:
        return
    for name, reason in session.swapped().items():
        raise StrictError(f"{name} of {type(pipe).__name__}: {reason}")


def _set(pipe: Any, name: str, value: Any, session: Session) -> None:
    owner, before = weakref.ref(pipe), pipe.__dict__.get(name)
    pipe.__dict__[name] = value

    def undo() -> None:
        found = owner()
        if found is None or found.__dict__.get(name) is not value:
            return
        if before is None:
            del found.__dict__[name]
        else:
            found.__dict__[name] = before

    session.on_close(undo)


class _CheckedMethod(NotPickled):
    """Stands on the instance for a method of the pipeline's class."""

    def __init__(self, name: str, session: Session) -> None:
        self._name, self._session = name, session

    def __deepcopy__(self, memo: dict[int, Any]) -> _CheckedMethod:
        return _CheckedMethod(self._name, self._session.copied(memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pipe = self._session.pipe
        # a shallow copy of the pipeline has this object too, and calls it on itself
        caller = sys._getframe(1).f_locals.get("self")
        if caller is not None and getattr(caller, "__dict__", {}).get(self._name) is self:
            pipe = caller
        _check(pipe, self._session)
        return getattr(type(pipe), self._name).__get__(pipe)(*args, **kwargs)


def _checked_blocks(blocks: Any, session: Session) -> Any:
    """Blocks that share all with ``blocks``, and look before they run."""
    kind = type(blocks)

    class Checked(kind):  # type: ignore[misc, valid-type]
        def __call__(self, pipeline: Any, state: Any) -> Any:
            _check(pipeline, session)
            return kind.__call__(self, pipeline, state)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return _checked_blocks(copy.deepcopy(blocks, memo), session.copied(memo))

    Checked.__name__, Checked.__qualname__, Checked.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    made = object.__new__(Checked)
    made.__dict__ = blocks.__dict__
    return made
