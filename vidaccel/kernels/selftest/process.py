"""A self-test in a process of its own: for kernels that could hang or break the CUDA context."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

from ..failures import in_words
from .verdicts import Verdict

__all__ = ["PATIENCE", "in_own_process"]

#: Longest time for the first compilation and all cases, in seconds.
PATIENCE = 900

#: What a process that could not use the GPU at all writes, in lower case, and what that means.
_NOT_TESTED = {
    "out of memory": "the GPU's memory is taken",
    "busy or unavailable": "the GPU is another process's alone (exclusive mode)",
    "no cuda gpus are available": "its process sees no GPU",
    "c compiler": in_words(RuntimeError("Failed to find C compiler")),
}


def in_own_process(
    module: str,
    function: str,
    argument: str,
    seconds: float = PATIENCE,
    progress: Callable[[str], None] = lambda case: None,
) -> Verdict:
    """Calls ``module.function(argument)`` in a fresh Python, which prints a verdict as its last line of JSON.

    Args:
        seconds: after which it is ended.
        progress: takes each other line that it prints, such as the names of the cases.

    Returns:
        What it printed. A crash is a wrong kernel. A process that could not begin, was short of memory or did not end
        in time is no verdict on it.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {function}; {function}({argument!r})"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as complaints:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=complaints, text=True, bufsize=1
            )
        except OSError as error:
            return Verdict("untested", f"a process for it could not be started: {error}")
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(seconds, end)
        clock.start()
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line.strip())
                if not lines[-1].startswith("{"):
                    progress(lines[-1])
            code_of_end = process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.stdout.close()
        if late.is_set():
            return Verdict("untested", f"it did not end within {seconds:g} seconds")
        complaints.seek(0)
        told = complaints.read()
    if code_of_end == 0 and lines:
        try:
            return Verdict.from_dict(json.loads(lines[-1]))
        except (ValueError, KeyError, TypeError):
            return Verdict("untested", f"its process ended with {lines[-1][:200]!r} instead of a verdict")
    for sign, meaning in _NOT_TESTED.items():
        if sign in told.lower():
            return Verdict("untested", meaning)
    last = told.strip().splitlines()
    return Verdict("wrong", f"its process ended with code {code_of_end}: {last[-1][:300] if last else 'no message'}")
