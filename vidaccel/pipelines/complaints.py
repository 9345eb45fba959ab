"""What a pipeline says about its own inputs, and that memory is too small for them, as one sentence each."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, VidaccelError

__all__ = ["own_complaints"]

#: Files of diffusers beside the pipeline's own that look at what it is given.
_LOOKING = ("image_processor.py", "video_processor.py")


@contextmanager
def own_complaints(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turns what the pipeline itself raises about its inputs into a `ConfigError`; other errors are bugs and stay.

    A complaint is what ``check_inputs`` raises, and a ValueError that a ``raise`` in a file of the pipeline makes.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, VidaccelError) or not _is_complaint(pipe, error):
            raise
        raise ConfigError(f"{type(pipe).__name__} refuses its inputs: {_one_line(error)}") from error
    except (RuntimeError, MemoryError) as error:
        # torch has no class for it where the CPU's memory ends; that of a GPU is torch.OutOfMemoryError
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        sizes = [f"{name} {arguments[name]}" for name in ("width", "height", "num_frames") if name in arguments]
        asked = f" for {', '.join(sizes)}" if sizes else ""
        raise ConfigError(f"this machine has too little memory{asked}; ask for fewer or smaller frames") from error


def _is_complaint(pipe: Any, error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "check_inputs" for frame in frames):
        return True
    last = frames[-1]
    raised = linecache.getline(last.filename, last.lineno or 0).lstrip().startswith("raise")
    return isinstance(error, ValueError) and raised and _belongs_to(pipe, Path(last.filename))


def _belongs_to(pipe: Any, file: Path) -> bool:
    # a class of a notebook has a module without a file
    own = {getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in type(pipe).__mro__}
    if str(file) in own or "modular_pipelines" in file.parts:
        return True
    return "diffusers" in file.parts and ("pipelines" in file.parts or file.name in _LOOKING)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
