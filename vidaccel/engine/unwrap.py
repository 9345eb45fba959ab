"""The transformer inside what others put around it."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["unwrapped"]

#: Class of a wrapper -> where it keeps the module. Matched by name, so that nothing is imported for it.
_INSIDE = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # LoraModel and its like, inside a PeftModel
}


def _inside(part: Any) -> nn.Module | None:
    """The module that a wrapper holds, or ``None`` for anything else."""
    if isinstance(part, nn.Module):
        for cls in type(part).__mro__:
            inner = part._modules.get(_INSIDE.get(cls.__name__, ""))
            if inner is not None:
                return inner
    return None


def unwrapped(part: Any) -> Any:
    """The module inside wrappers of ``torch.compile``, data parallelism and peft; anything else as it is."""
    inner = _inside(part)
    while inner is not None:
        part, inner = inner, _inside(inner)
    return part
