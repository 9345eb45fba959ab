"""Everything vidaccel raises on purpose.

::

    VidaccelError
    ├── ConfigError (ValueError)        a plan, policy, preset or argument that cannot be used
    │   ├── LayoutError                 a grid, tile or sequence that does not fit
    │   └── PlanFileError               a plan file that is missing, truncated or not a plan
    ├── PlanMismatchError (ValueError)  a good plan, made for another model, grid or scheduler
    ├── PatchError (RuntimeError)       patch/unpatch called where it cannot work
    │   ├── AlreadyPatchedError
    │   ├── NotPatchedError
    │   └── UnsupportedModelError       nothing in the pipeline that we know how to patch
    ├── KernelError (RuntimeError)      no kernel can run what was asked
    ├── StrictError (RuntimeError)      ``strict=True`` and something would have run dense
    └── OutputError (OSError)           a file that could not be written

Every message is one sentence or two: what was found, what is valid, how to fix it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AlreadyPatchedError",
    "ConfigError",
    "KernelError",
    "LayoutError",
    "NotPatchedError",
    "OutputError",
    "PatchError",
    "PlanFileError",
    "PlanMismatchError",
    "StrictError",
    "UnsupportedModelError",
    "VidaccelError",
    "VidaccelWarning",
    "did_you_mean",
]


class VidaccelError(Exception):
    """Base of every error that vidaccel raises on purpose."""


class ConfigError(VidaccelError, ValueError):
    """A plan, policy, preset or argument that cannot be used."""


class LayoutError(ConfigError):
    """A grid, tile or sequence length that does not fit."""


class PlanFileError(ConfigError):
    """A plan file that is missing, truncated, or not a plan."""


class PlanMismatchError(VidaccelError, ValueError):
    """A good plan that was made for another model, grid or scheduler."""


class PatchError(VidaccelError, RuntimeError):
    """``patch`` or ``unpatch`` called where it cannot work."""


class AlreadyPatchedError(PatchError):
    """The pipeline is patched already."""


class NotPatchedError(PatchError):
    """The pipeline is not patched."""


class UnsupportedModelError(PatchError):
    """Nothing in the pipeline that vidaccel knows how to patch."""


class KernelError(VidaccelError, RuntimeError):
    """No kernel can run what was asked."""


class StrictError(VidaccelError, RuntimeError):
    """``strict=True`` was asked and something would have run dense."""


class OutputError(VidaccelError, OSError):
    """A file that could not be written."""


class VidaccelWarning(UserWarning):
    """Something is not as asked, and the run goes on; the message says what and why."""


def did_you_mean(found: object, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the valid name it resembles most, or nothing.

    Letter case counts for nothing here, though it does where names are looked up.
    """
    if not isinstance(found, str):
        return ""
    names = {name.lower(): name for name in valid}
    nearest = get_close_matches(found.lower(), names, n=1)
    return f"; did you mean {names[nearest[0]]}?" if nearest else ""
