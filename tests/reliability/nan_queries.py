"""What attention makes of a query that is not finite depends on the processor; here it can be chosen.

torch's flash attention for CPUs gives NaN for a NaN query on some vector units and zeros on others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NAN_QUERIES", "nan_queries"]

#: What a processor makes of them, and ``None`` for what this one does.
NAN_QUERIES = (None, "NaN", "zeros")

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _Rows(TorchDispatchMode):
    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is _FLASH:
            query, (out, lse) = args[0], found
            bad = ~torch.isfinite(query).all(-1, keepdim=True)
            return out.masked_fill(bad, self._value), lse.masked_fill(bad[..., 0], self._value or -torch.inf)
        return found


@contextmanager
def nan_queries(give: str | None) -> Iterator[None]:
    """Queries that are not finite give this; one of :data:`NAN_QUERIES`."""
    if give is None:
        yield
        return
    with _Rows({"NaN": torch.nan, "zeros": 0.0}[give]):
        yield
