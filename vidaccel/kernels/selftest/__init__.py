"""Whether a kernel computes the right thing on this machine: a few hard cases against the float64 oracle, once.

The tests of this package prove what runs on any CPU, and what a compiler made for a GPU as far as that is possible
without one. The rest is seen where the kernel is about to run: see :func:`check_kernel`.
"""

from __future__ import annotations

from .cases import CASES, Case, cases_of
from .check import Tested, check_kernel, on_screen
from .examine import examine
from .process import PATIENCE, in_own_process
from .verdicts import Verdict, verdict

__all__ = [
    "CASES",
    "PATIENCE",
    "Case",
    "Tested",
    "Verdict",
    "cases_of",
    "check_kernel",
    "examine",
    "in_own_process",
    "on_screen",
    "verdict",
]
