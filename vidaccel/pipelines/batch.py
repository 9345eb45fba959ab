"""Many prompts, by one process or several: each clip is made once, and a clip that fails does not lose the others.

A clip is done when its .json exists: it is written after the .mp4, or the .mp4s where the pipeline makes several clips
of one prompt, and each appears whole or not at all. So a run that was killed goes on where it was, with any number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .generate import Request

__all__ = ["Clip", "Share", "clip_paths", "clips_of", "make_clips"]

_LONGEST_NAME = 48


@dataclass(frozen=True)
class Clip:
    """One prompt of many.

    Args:
        number: its place in the list, counted from 1.
        request: what to generate.
        video: the .mp4 file, or the first of several; the .json of the same name says how it was made.
        fingerprint: of everything that decides what is in the video.
    """

    number: int
    request: Request
    video: Path
    fingerprint: str

    @property
    def record(self) -> Path:
        """The .json file."""
        return self.video.with_suffix(".json")

    def is_done(self) -> bool:
        """Whether the clip was made before.

        Raises:
            OutputError: if there is a clip of other settings, or a file that is none of ours, under its name.
        """
        if not self.record.exists():
            return False
        known, files = self._recorded()
        if known != self.fingerprint:
            raise OutputError(
                f"{self.record} is of a clip made with another model, plan or settings; choose another folder, or"
                " delete it to have the clip made anew"
            )
        return all((self.video.parent / name).exists() for name in files)

    @property
    def files(self) -> list[str]:
        """Names of its videos, once it is done."""
        return self._recorded()[1]

    def _recorded(self) -> tuple[Any, list[str]]:
        """Fingerprint and videos of its .json; no fingerprint if that is none of ours."""
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))
            return found.get("fingerprint"), list(found.get("files", [self.video.name]))
        except (OSError, ValueError, AttributeError, TypeError):
            return None, []


@dataclass(frozen=True)
class Share:
    """One of several processes, each of which makes its part of the clips."""

    index: int = 0
    count: int = 1

    def of(self, clips: Sequence[Clip]) -> list[Clip]:
        """Every ``count``-th clip."""
        return [clip for clip in clips if (clip.number - 1) % self.count == self.index]


def clip_paths(first: Path, count: int) -> list[Path]:
    """Where so many clips of one prompt are written: clip.mp4, clip-2.mp4, clip-3.mp4, ..."""
    return [first, *(first.with_stem(f"{first.stem}-{number}") for number in range(2, count + 1))]


def clips_of(requests: Sequence[Request], folder: Path, about: Mapping[str, Any]) -> list[Clip]:
    """The clips of these requests, named by number and prompt.

    Args:
        about: what else decides what is in the videos, JSON-able: model, plan, dtype, frame rate.
    """
    digits = max(3, len(str(len(requests))))
    settings = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:24]
    found = []
    for number, request in enumerate(requests, 1):
        words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:_LONGEST_NAME].strip("-")
        name = f"{number:0{digits}d}-{words}".rstrip("-") + ".mp4"
        found.append(Clip(number, request, folder / name, f"{request.fingerprint}-{settings}"))
    return found


def make_clips(
    clips: Sequence[Clip], make: Callable[[Clip], Mapping[str, Any]], *, fatal: tuple[type[BaseException], ...] = ()
) -> Iterator[dict[str, Any]]:
    """Makes what is not there yet; yields one JSON-able line for each clip.

    Args:
        make: generates a clip and writes its files; what it returns goes into the line.
        fatal: errors that end the run, because every other clip would meet them.

    Raises:
        OutputError: before anything is made, if a file of another run is in the way.
    """
    done = {clip.number: clip.is_done() for clip in clips}
    for clip in clips:
        line: dict[str, Any] = {"number": clip.number, "prompt": clip.request.prompt, "seed": clip.request.seed}
        if done[clip.number]:
            yield {**line, "state": "found", "file": clip.video.name, "files": clip.files}
            continue
        try:
            made = make(clip)
        except fatal:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, it is told, and the others are still made
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            yield {
                **line,
                "state": "failed",
                "error": f"{type(error).__name__}: {told}",
                "at": f"{Path(where.filename).name}:{where.lineno}",
            }
            continue
        yield {**line, "state": "made", "file": clip.video.name, **made}
