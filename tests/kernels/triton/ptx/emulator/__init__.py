"""Executes the PTX that Triton compiles, on a CPU, one CTA at a time, and finds faults of the compiled program."""

from .faults import Deadlock, Fault
from .launch import Emulator, emulating

__all__ = ["Deadlock", "Emulator", "Fault", "emulating"]
