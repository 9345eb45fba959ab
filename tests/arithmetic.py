"""The arithmetic that the tests run with, chosen by environment variables, so that one machine can stand for others.

===========================  ======================================================================================
``VIDACCEL_TEST_THREADS``    threads of torch in each process; 1 if it is not set
``VIDACCEL_TEST_ONEDNN``     ``0`` switches oneDNN off
===========================  ======================================================================================

``ATEN_CPU_CAPABILITY``, ``ONEDNN_MAX_CPU_ISA`` and ``MKL_ENABLE_INSTRUCTIONS`` are read by torch and its libraries
themselves. ``python -m tests.settings`` runs the tests under all of them.
"""

from __future__ import annotations

import os

import torch

__all__ = ["apply", "described"]


def apply() -> None:
    """Sets this process up; called before the first test."""
    torch.set_num_threads(int(os.environ.get("VIDACCEL_TEST_THREADS", "1")))
    onednn = os.environ.get("VIDACCEL_TEST_ONEDNN", "1")
    if onednn not in ("0", "1"):
        raise ValueError(f"VIDACCEL_TEST_ONEDNN is {onednn!r}; give 0 for off or 1 for on")
    if onednn == "0":
        torch.backends.mkldnn.set_flags(False)


def described() -> str:
    """What is in effect, in a line."""
    parts = [
        f"{torch.get_num_threads()} thread(s)",
        f"ATen for {torch.backends.cpu.get_cpu_capability()}",
        f"oneDNN {'on' if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled else 'off'}",
    ]
    named = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return ", ".join(parts + [f"{name}={os.environ[name]}" for name in named if name in os.environ])
