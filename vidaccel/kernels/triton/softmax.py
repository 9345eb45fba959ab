"""The online softmax of flash attention as device functions, in base 2, because ``exp2`` is what the hardware has.

State of each query row: ``top``, the largest score so far; ``total``, the sum of 2^(score - top); ``acc``, the sum of
2^(score - top) * v. A key piece with scores s updates it::

    top'  = max(top, max(s))
    p     = 2^(s - top')
    fade  = 2^(top - top')
    total = total * fade + sum(p)
    acc   = acc * fade + p @ v
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest", "log_sum_exp", "weights"]


@triton.jit
def largest(scores, factor, BIASED: tl.constexpr):
    """Largest score of each row in base-2 units: [BLOCK_M].

    ``scores`` [BLOCK_M, BLOCK_N] become base-2 units by ``factor`` [BLOCK_M], which is positive, so the maximum can be
    taken first. Biased scores are in base-2 units already.
    """
    most = tl.max(scores, 1)
    if not BIASED:
        most = most * factor
    return most


@triton.jit
def weights(scores, factor, top, BIASED: tl.constexpr):
    """2^(score - top): [BLOCK_M, BLOCK_N], at most 1. One fused multiply-add and one exponential per score."""
    if not BIASED:
        scores = scores * factor[:, None]
    return tl.exp2(scores - top[:, None])


@triton.jit
def log_sum_exp(top, total):
    """Natural logarithm of the row's summed exponentials, from its state: [BLOCK_M]."""
    return (top + tl.log2(total)) * 0.6931471805599453
