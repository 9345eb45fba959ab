"""Block-sparse attention: one contract, one oracle, and the kernels that run it.

========================  =============================================================================
:mod:`.contract`          the signature every kernel shares, and the checks on its arguments
:mod:`.reference`         the oracle: slow, in float64, every precision
:mod:`.torch_sparse`      gathers key blocks and calls dense attention on them; any device
:mod:`.emulated`          rounds as few-bit precisions do, on the CPU, to measure their quality
:mod:`.dispatch`          which kernel runs a request, and why another one cannot
========================  =============================================================================

Below them: :mod:`.schedule` (what to gather), :mod:`.dense` (dense attention that returns its LSE), :mod:`.tail`
(the pooled tail), :mod:`.merge` (two partial results into one), :mod:`.quantise` (scales and roundings),
:mod:`.microscaling` (NVFP4) and :mod:`.channels` (factors that even out the channels of Q and K).
"""

from __future__ import annotations

from .contract import Kernel, KernelRequest
from .dispatch import kernels, select, why_not_table

__all__ = ["Kernel", "KernelRequest", "kernels", "select", "why_not_table"]
