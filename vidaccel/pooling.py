"""One vector for a whole block: means of queries, keys and values, which patterns and the pooled tail share."""

from __future__ import annotations

import torch

from .layout import TokenLayout

__all__ = ["block_means", "log_block_sizes"]


def block_means(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Mean of each block of ``x`` [N,S,D] in layout order, float32 [N,NB,D]."""
    n, _, d = x.shape
    if layout.uniform:
        return x.reshape(n, layout.num_blocks, -1, d).mean(2, dtype=torch.float32)
    sums = torch.zeros(n, layout.num_blocks, d, dtype=torch.float32, device=x.device)
    sums.index_add_(1, layout.block_of_token.to(x.device), x.float())
    return sums / layout.block_sizes.to(device=x.device, dtype=torch.float32)[:, None]


def log_block_sizes(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """log n_j, float32 [NB]."""
    return layout.block_sizes.to(device=device, dtype=torch.float32).log()
