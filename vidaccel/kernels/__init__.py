"""Block-sparse attention: one contract, one oracle, and the kernels that run it.

========================  =============================================================================
:mod:`.contract`          the signature every kernel shares, and the checks on its arguments
:mod:`.reference`         the oracle: slow, in float64, every precision
:mod:`.torch_sparse`      gathers key blocks and calls dense attention on them; any device
:mod:`.dispatch`          which kernel runs a request, and why another one cannot
========================  =============================================================================

Below them: :mod:`.schedule` (what to gather), :mod:`.dense` (dense attention that returns its LSE), :mod:`.tail`
(the pooled tail), :mod:`.merge` (two partial results into one) and :mod:`.quantise` (scales and roundings).
"""

from __future__ import annotations

from .contract import Kernel, KernelRequest
from .dispatch import kernels, select, why_not_table

__all__ = ["Kernel", "KernelRequest", "kernels", "select", "why_not_table"]
