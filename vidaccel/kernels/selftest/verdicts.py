"""What a self-test found, and where it is kept so that it runs once on a machine.

Only what was computed is kept: that a kernel is right or wrong. That it could not be tested, for want of memory or
time, or because the GPU is another process's, says nothing about the kernel, and is tried again in the next process.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ...device import cache_dir
from ...errors import OutputError, VidaccelWarning
from ...files import write_json

__all__ = ["Outcome", "Verdict", "verdict"]

#: ``untested``: no result came back.
Outcome = Literal["right", "wrong", "untested"]


@dataclass(frozen=True)
class Verdict:
    """What a self-test found.

    Args:
        outcome: whether every case was right, one was wrong, or none could be computed to its end.
        reason: a sentence on the first thing that was wrong, or on why nothing was computed; ``None`` if all is right.
        errors: largest error of each case that ran, as a share of what is allowed.
    """

    outcome: Outcome
    reason: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the kernel may run."""
        return self.outcome == "right"

    def __str__(self) -> str:
        if self.passed:
            return f"right, {max(self.errors.values()):.2f} of the error that its roundings allow"
        return f"{self.outcome}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"outcome": self.outcome, "reason": self.reason, "errors": dict(self.errors)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Verdict:
        """The verdict that :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError: if it is none.
        """
        outcome, reason = data["outcome"], data["reason"]
        if outcome not in get_args(Outcome) or not (reason is None or isinstance(reason, str)):
            raise TypeError("not a verdict")
        return Verdict(outcome, reason, dict(data["errors"]))


def verdict(
    name: str, machine: Mapping[str, str], test: Callable[[], Verdict], folder: Path | None = None
) -> tuple[Verdict, bool]:
    """The kept verdict on kernel ``name`` for this ``machine``, or a fresh one, and whether it is fresh.

    Args:
        machine: all that the answer depends on: device, driver, versions, the kernel's source, the call.
        test: makes a fresh verdict.
        folder: where verdicts are kept, ``None`` for the user's cache directory.
    """
    folder = cache_dir() / "self-test" if folder is None else folder
    digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.json"
    known = _kept(path, machine)
    if known is not None:
        return known, False
    made = test()
    if made.outcome == "untested":
        return made, True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"kernel": name, "machine": dict(machine), **made.to_dict()})
    except (OSError, OutputError) as error:
        message = (
            f"the self-test of {name} will run again in the next process, because its verdict was not kept: {error}"
        )
        warnings.warn(message, VidaccelWarning, stacklevel=2)
    return made, True


def _kept(path: Path, machine: Mapping[str, str]) -> Verdict | None:
    """The verdict in a file, ``None`` if there is none or it is not about this machine."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Verdict.from_dict(data) if data["machine"] == dict(machine) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is made again, and the file written anew
