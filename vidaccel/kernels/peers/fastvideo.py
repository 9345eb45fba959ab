"""FastVideo's kernel for VSA: blocks of 64 tokens, ThunderKittens on Hopper and Triton elsewhere.

https://github.com/hao-ai-lab/FastVideo, package ``fastvideo-kernel``. Read at version 0.3.5.
"""

from __future__ import annotations

import math

import torch

from ...blockmask import BlockMask
from ...errors import KernelError
from ...layout import TokenLayout
from ...types import PRECISIONS, Precision
from ..contract import AttentionResult, KernelRequest, Skips, check_inputs
from ..gradient import forward_only
from .limits import Limits
from .pieces import pieces_of

__all__ = ["NAME", "PACKAGES", "block_sparse_attention", "why_not"]

NAME, PACKAGES = "fastvideo", ("fastvideo-kernel",)
_SIZE = 64
_LIMITS = Limits(
    "fastvideo_kernel", "pip install fastvideo-kernel", (8, 9, 10, 12), (torch.bfloat16,), (64, 128)
)  # fmt: skip


def why_not(request: KernelRequest) -> str | None:
    """Why FastVideo's kernel cannot run the request, or ``None``."""
    return _LIMITS.why_not(request)


@forward_only
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    *,
    scale: float | None = None,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
    return_lse: bool = False,
    skips: Skips | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; arguments as :class:`..contract.Kernel` has them.

    Raises:
        LayoutError: if shapes and layout do not fit together.
        KernelError: if :func:`why_not` has a reason, the mask has a rule over tokens, or the scale is not 1/sqrt(D).
    """
    check_inputs(q, k, v, layout, mask)
    reason = why_not(KernelRequest.of(q, precision, tail=tail, return_lse=return_lse, skip=skips is not None))
    if mask.rule is not None:
        reason = reason or "it keeps whole blocks, and a rule cuts some"
    if scale is not None and not math.isclose(scale, 1 / math.sqrt(q.shape[-1]), rel_tol=1e-6):
        reason = reason or f"its scale is 1/sqrt({q.shape[-1]}), and {scale} is asked for"
    if reason:
        raise KernelError(f"FastVideo's kernel cannot run this: {reason}")
    from fastvideo_kernel import block_sparse_attn_from_indices

    pieces = pieces_of(layout, _SIZE, q.device)
    counts, index = pieces.lists(mask.to(q.device), q.shape[0], q.shape[2])
    heads_first = (pieces.pad(x).transpose(1, 2).contiguous() for x in (q, k, v))
    out, _ = block_sparse_attn_from_indices(*heads_first, index, counts, pieces.lengths)
    return pieces.unpad(out.transpose(1, 2))
