"""What an error of a head means behind the layer's output projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..pipelines.patch import find_transformers

__all__ = ["projections"]


def projections(pipe: Any) -> Mapping[tuple[str, int], torch.Tensor]:
    """W^T W of each head's part of the output projection, float32 [H,D,D], by transformer and layer.

    Layers without a plain projection are absent: there errors are measured at the attention output itself, in other
    units, so they are never mixed with the rest.
    """
    found = {}
    for name, model, family in find_transformers(pipe):
        for layer, (_, module) in enumerate(family.attention_layers(model)):
            out = getattr(module, "to_out", None)
            linear = out[0] if isinstance(out, torch.nn.ModuleList | torch.nn.Sequential) and len(out) else out
            weight = getattr(linear, "weight", None)
            heads = family.heads_of(module)
            if not isinstance(weight, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
                continue
            if weight.dim() != 2 or weight.shape[1] % heads:
                continue
            parts = weight.detach().float().view(weight.shape[0], heads, -1).transpose(0, 1)
            found[(name, layer)] = parts.mT @ parts
    return found
