"""A pipeline as it is used: in the middle of a call, so that nothing may be swapped under it, or compiled."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

from torch import nn

from ..errors import PatchError

__all__ = ["check_idle", "uncompiled"]


def uncompiled(part: Any) -> Any:
    """The module inside the one that ``torch.compile`` returns; anything else as it is."""
    return part._modules.get("_orig_mod", part) if isinstance(part, nn.Module) else part


def check_idle(pipe: Any, models: Sequence[nn.Module], what: str) -> None:
    """Refuses while the pipeline, or one of its transformers, runs: in this thread (a callback) or in another.

    The calls that are going on are looked at themselves. A flag that says "running" would stay up after an interrupted
    run, and step counters do, too.

    Args:
        what: what was asked for, ``"patch"`` or ``"unpatch"``.

    Raises:
        PatchError: if it runs.
    """
    calls = _calls(pipe)
    for thread, top in sys._current_frames().items():
        for frame in _stack(top):
            if _is_call(frame, pipe, calls) or _is_forward(frame, models):
                where = "in a callback of it" if thread == threading.get_ident() else "in another thread"
                raise PatchError(
                    f"{type(pipe).__name__} is running, and this {what} came {where}; call vidaccel.{what}(pipe) before"
                    " or after the run"
                )


def _calls(pipe: Any) -> set[CodeType]:
    """Code of the ``__call__`` that denoises: of the base class. One that wraps it may patch before it begins."""
    if isinstance(pipe, nn.Module):
        return set()
    found = [cls.__dict__["__call__"] for cls in type(pipe).__mro__ if "__call__" in cls.__dict__]
    function = inspect.unwrap(found[-1]) if found else None
    code = getattr(function, "__code__", None)
    return set() if code is None else {code}


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_call(frame: FrameType, pipe: Any, calls: set[CodeType]) -> bool:
    return frame.f_code in calls and frame.f_locals.get("self") is pipe


def _is_forward(frame: FrameType, models: Sequence[nn.Module]) -> bool:
    if frame.f_code is not nn.Module._call_impl.__code__:
        return False
    module = uncompiled(frame.f_locals.get("self"))
    return any(module is model for model in models)
