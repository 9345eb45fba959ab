"""The pooled tail: what a query still sees of the blocks it skips.

Each skipped block j of n_j tokens stands in as one key, its mean, with the logit ``scale * q.kmean_j + log n_j`` and
the value ``vmean_j``: exact if the block's tokens were all alike. A partial result with its own LSE, to be merged
with that of the kept blocks.
"""

from __future__ import annotations

import torch

from ..layout import TokenLayout

__all__ = ["block_means", "log_block_sizes", "pooled_tail"]

#: Most logits held at once; longer queries are cut.
_MAX_LOGITS = 1 << 22


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


def pooled_tail(
    q: torch.Tensor, k_means: torch.Tensor, v_means: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q over block means.

    Args:
        q: [N,L,D], any dtype.
        k_means, v_means: float32 [N,NB,D].
        bias: float32 [N,NB], log n_j for the skipped blocks and -inf for the kept ones; skips at least one.
        scale: multiplies q k^T.

    Returns:
        The output, float32 [N,L,D], and its LSE [N,L].
    """
    n, length, _ = q.shape
    step = max(1, _MAX_LOGITS // max(1, n * bias.shape[-1]))
    if length > step:
        parts = [pooled_tail(rows, k_means, v_means, bias, scale) for rows in q.split(step, dim=1)]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
    logits = torch.baddbmm(bias.unsqueeze(1), q.float(), k_means.transpose(1, 2), alpha=scale)
    weights = logits.softmax(-1)
    # the largest weight is exp(largest logit - lse): cheaper than a second pass of exponentials
    return torch.bmm(weights, v_means), logits.amax(-1) - weights.amax(-1).log()
