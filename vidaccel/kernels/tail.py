"""The pooled tail: what a query still sees of the blocks it skips.

Each skipped block j of n_j tokens stands in as one key, its mean, with the logit ``scale * q.kmean_j + log n_j`` and
the value ``vmean_j``: exact if the block's tokens were all alike. A partial result with its own LSE, to be merged
with that of the kept blocks.
"""

from __future__ import annotations

import torch

__all__ = ["pooled_tail"]

#: Most logits held at once; longer queries are cut.
_MAX_LOGITS = 1 << 22


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
