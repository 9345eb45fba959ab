"""Tokens in layout order for a whole forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..engine.attachment import NotPickled
from ..engine.gate import ForwardGate
from ..engine.ops import reorder

__all__ = ["TokenOrder"]


class TokenOrder(NotPickled):
    """Hooks that put tokens in layout order where they enter the block stack, and back where they leave it.

    They sit outside the stack, because caches skip blocks and model parallelism cuts between them.
    """

    def __init__(self, gate: ForwardGate) -> None:
        self._gate = gate

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenOrder:
        return self  # a copy of the model drops it

    @property
    def _works(self) -> bool:
        """Whether to reorder; a compiled graph holds an operator that knows it when it runs."""
        if torch.compiler.is_compiling():
            return True
        context = self._gate.context
        return context is not None and context.tiled

    def _tile(self, x: torch.Tensor, dim: int, *, back: bool = False) -> torch.Tensor:
        gate = self._gate
        if torch.compiler.is_compiling():
            return reorder(x, gate.handle, gate.token, dim, back)
        context = gate.context
        assert context is not None
        layout = context.layout(x.device)
        return layout.untile(x, dim) if back else layout.tile(x, dim)

    def tile_volume(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of a patch embedding with output [B, C, T, H, W], which the model flattens next."""
        return self._tile(out.flatten(2), 2).unflatten(2, out.shape[2:]) if self._works else None

    def tile_tokens(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of a patch embedding with output [B, S, C]."""
        return self._tile(out, 1) if self._works else None

    def tile_tables(self, module: nn.Module, args: Any, out: tuple[torch.Tensor, ...]) -> Any:
        """Forward hook of a RoPE module with tables [S, D] or [1, S, 1, D]."""
        return tuple(self._tile(table, 0 if table.dim() == 2 else 1) for table in out) if self._works else None

    def untile_tokens(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Forward pre-hook of the final norm, which takes [B, S, C]."""
        if not self._works:
            return None
        x, *rest = args
        return (self._tile(x, 1, back=True), *rest)
