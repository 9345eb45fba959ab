"""What a kernel raises where another one may still run: told in words, and whether trying it again could help.

A kernel is compiled for the device it meets, by tools that may be missing there, and launched with memory that may be
gone. None of this is the user's fault, and dense attention can finish the video.
"""

from __future__ import annotations

import subprocess
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from ..errors import KernelError, VidaccelError, VidaccelWarning

__all__ = ["breaks_the_device", "in_words", "is_passing", "is_recoverable", "or_else", "tell", "told_to"]

P = ParamSpec("P")
R = TypeVar("R")

_OUT_OF_MEMORY = "out of memory"
_BROKEN_CONTEXT = (
    "illegal memory access", "illegal instruction", "misaligned address", "unspecified launch failure",
    "device-side assert", "invalid program counter", "hardware stack error", "launch timed out",
)  # fmt: skip
_LONGEST = 200


def is_recoverable(error: Exception) -> bool:
    """Whether something else can compute what this kernel did not.

    Not after an error that :func:`breaks_the_device`, and not for what vidaccel raises about the call itself, which is
    the same for every kernel.
    """
    if isinstance(error, VidaccelError):
        return isinstance(error, KernelError)
    return not breaks_the_device(error)


def breaks_the_device(error: Exception) -> bool:
    """Whether the CUDA context answers every later call with this error."""
    told = str(error).lower()
    return "cuda" in told and any(sign in told for sign in _BROKEN_CONTEXT)


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed later, because only memory was short."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY in str(error).lower()


def in_words(error: Exception) -> str:
    """What happened, and what to do about it if something can be done: part of a sentence.

    Example:
        >>> in_words(RuntimeError("Failed to find C compiler. Please specify via CC environment variable."))
        'no C compiler was found for its launcher; install gcc, or set CC'
    """
    name, message = type(error).__name__, _first_line(error)
    lower = message.lower()
    if is_passing(error):
        return _OUT_OF_MEMORY
    if "c compiler" in lower or (isinstance(error, FileNotFoundError) and _is_compiler(error.filename)):
        return "no C compiler was found for its launcher; install gcc, or set CC"
    if isinstance(error, subprocess.CalledProcessError):
        tool = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{str(tool).rsplit('/', 1)[-1]} ended with code {error.returncode}"
    if name == "PTXASError" or "ptxas" in lower:
        return f"ptxas refused its program: {message}"
    if name == "OutOfResources":
        return f"it needs more than one multiprocessor has: {message}"
    if name == "CompilationError":
        return f"it does not compile: {message}"
    return f"{name}: {message}" if message else name


def _first_line(error: Exception) -> str:
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    # Triton's compiler shows the source first and says what is wrong with it last
    line = (lines[-1] if type(error).__name__ == "CompilationError" else lines[0]) if lines else ""
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _is_compiler(filename: object) -> bool:
    return str(filename).rsplit("/", 1)[-1] in ("gcc", "cc", "clang", "c++", "g++", "cl", "cl.exe")


# -- to whom it is told -----------------------------------------------------------------------------------------------

_LISTENERS = threading.local()


@contextmanager
def told_to(listener: Callable[[str], None]) -> Iterator[None]:
    """What :func:`tell` says in this thread goes to ``listener`` while the body runs."""
    before = getattr(_LISTENERS, "current", None)
    _LISTENERS.current = listener
    try:
        yield
    finally:
        _LISTENERS.current = before


def tell(reason: str) -> None:
    """Says that something does not run as it should: to the layer that is being computed, else as a warning."""
    listener = getattr(_LISTENERS, "current", None)
    if listener is None:
        warnings.warn(reason, VidaccelWarning, stacklevel=3)
    else:
        listener(reason)


# -- of kernels that have a twin in torch -----------------------------------------------------------------------------

#: Which raised in this process, and what.
_FAILED: dict[Hashable, str] = {}


def or_else(name: str, key: Hashable, fast: Callable[P, R], plain: Callable[P, R]) -> Callable[P, R]:
    """``fast``, and where it raises or has raised ``plain``, which computes the same.

    Args:
        name: how a report calls ``fast``.
        key: what it is compiled for: once it has raised for that, it is not tried again in this process, unless only
            memory was short.
    """

    def run(*args: P.args, **options: P.kwargs) -> R:
        if (name, key) not in _FAILED:
            try:
                return fast(*args, **options)
            except Exception as error:  # the compiler's, the driver's and the launcher's own kinds
                if not is_recoverable(error):
                    raise
                reason, passing = in_words(error), is_passing(error)
            if not passing:
                _FAILED[name, key] = reason
        else:
            reason = _FAILED[name, key]
        tell(f"kernel {name} failed ({reason}), torch takes its place")
        return plain(*args, **options)

    return run
