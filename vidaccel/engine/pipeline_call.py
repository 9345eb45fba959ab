"""Which call of which pipeline a forward pass belongs to, read off the calls that are going on.

A denoising run begins when a pipeline is called and ends when that call returns. Nothing tells a transformer so: noise
levels repeat (a run of one step, Heun's second evaluation, a run that was interrupted), step counters keep what an
interrupted run left, and the pipeline that runs may be another than the one that was patched. So a forward pass looks
up the stack for the ``__call__`` of an object that holds the transformer. No class is changed for it, and no flag is
set that an interrupted run could leave behind.

Only the stack of the own thread is ever looked at. Python 3.11 crashes where one thread takes frames of another that is
about to leave them (``sys._current_frames``), and the local variables of a running frame are not safe to read from
another thread in any version before 3.13.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

from torch import nn

from ..errors import PatchError
from .attachment import attachment_of
from .unwrap import unwrapped

__all__ = ["PipelineCall", "check_idle", "is_going_on", "pipeline_call"]

_MARK = "_vidaccel_call"


class PipelineCall:
    """One call of an object that may be a pipeline. Its mark is an entry among the local variables of the call's frame,
    though no variable of the function, so it lives exactly as long as the call.

    Args:
        pipeline: the object.

    Attributes:
        thread: the thread it runs in.
        runs: what belongs to the call, by owner.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.thread = threading.get_ident()
        self.runs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._held: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def holds(self, model: nn.Module) -> bool:
        """Whether the object holds the model; looked up once a call."""
        if model not in self._held:
            self._held[model] = _holds(self.pipeline, model)
        return self._held[model]


# by the address of the frame: as long as the mark lives, so does the frame that holds it
_marks: weakref.WeakValueDictionary[int, PipelineCall] = weakref.WeakValueDictionary()


def pipeline_call(model: nn.Module) -> PipelineCall | None:
    """The innermost call in this thread of an object that holds ``model``, or ``None`` in a loop of one's own."""
    for frame in _stack(sys._getframe(1)):
        if _is_method_call(frame):
            call = _marks.get(id(frame))
            if call is None:
                variables = frame.f_locals
                call = variables[_MARK] = PipelineCall(variables.get(_first_argument(frame)))
                _marks[id(frame)] = call
            if call.holds(model):
                return call
    return None


def check_idle(pipe: Any, models: Sequence[nn.Module], what: str) -> None:
    """Refuses while one of the transformers, or a pipeline that holds one, runs: in this thread or in another.

    In another thread only what is patched is seen. The first patch of a transformer that runs there holds from its next
    forward pass on: a pass that began without us runs to its end as it began.

    Args:
        pipe: the pipeline that is asked for, or ``None``.
        models: its transformers.
        what: what was asked for, ``"patch"`` or ``"unpatch"``.

    Raises:
        PatchError: if it runs.
    """
    own = (_running(frame, pipe, models) for frame in _stack(sys._getframe(1)))
    owner, where = next((found for found in own if found is not None), None), "in a callback of it"
    if owner is None:
        owner, where = _running_elsewhere(pipe, models), "in another thread"
    if owner is not None:
        raise PatchError(
            f"{type(owner).__name__} is running, and this {what} came {where}; call vidaccel.{what}(pipe) before or"
            " after the run"
        )


def is_going_on(call: PipelineCall) -> bool:
    """Whether a call of any thread has not returned. One that failed has, although a traceback may keep its frame."""
    if sys.version_info < (3, 11):  # the collector knows all frames there, and those of other threads are safe to take
        return any(_marks.get(id(frame)) is call for top in sys._current_frames().values() for frame in _stack(top))
    # The call is among the variables of its frame, and the collector knows a frame only when it is left
    variables = [holder for holder in gc.get_referrers(call) if type(holder) is dict]
    return bool(variables) and not any(isinstance(holder, FrameType) for holder in gc.get_referrers(*variables))


def _running_elsewhere(pipe: Any, models: Sequence[nn.Module]) -> Any:
    """The pipeline or patched transformer that runs in another thread, or ``None``."""
    for model in models:
        attachment = attachment_of(model)
        if attachment is not None and attachment.runs_elsewhere:
            return model
    mine = threading.get_ident()
    for reference in _marks.valuerefs():
        call = reference()
        if call is None or call.thread == mine:
            continue
        if (call.pipeline is pipe or any(call.holds(model) for model in models)) and is_going_on(call):
            return call.pipeline
    return None


def _running(frame: FrameType, pipe: Any, models: Sequence[nn.Module]) -> Any:
    """The pipeline or transformer whose call a frame is of, or ``None``."""
    if frame.f_code is nn.Module._call_impl.__code__:
        module = frame.f_locals.get("self")
        return module if any(unwrapped(module) is model for model in models) else None
    if not _is_method_call(frame):
        return None
    owner = frame.f_locals.get(_first_argument(frame))
    # of the base class: a class that wraps a pipeline's `__call__` may patch itself before it calls that
    if frame.f_code is not _base_call(owner):
        return None
    return owner if owner is pipe or any(_holds(owner, model) for model in models) else None


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_method_call(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "__call__" and code.co_argcount > 0 and bool(code.co_flags & inspect.CO_OPTIMIZED)


def _first_argument(frame: FrameType) -> str:
    return frame.f_code.co_varnames[0]


def _base_call(owner: Any) -> CodeType | None:
    """Code of the ``__call__`` of the most basic class that has one."""
    found = [cls.__dict__["__call__"] for cls in type(owner).__mro__ if "__call__" in cls.__dict__]
    function = inspect.unwrap(found[-1]) if found else None
    return getattr(function, "__code__", None)


def _holds(owner: Any, model: nn.Module) -> bool:
    """Whether an object that is no module itself has the model among its attributes, or inside of one."""
    if isinstance(owner, nn.Module):
        return False
    attributes: dict[str, Any] = getattr(owner, "__dict__", {})
    modules = [part for part in list(attributes.values()) if isinstance(part, nn.Module)]
    return any(unwrapped(part) is model for part in modules) or any(
        inner is model for part in modules for inner in part.modules()
    )
