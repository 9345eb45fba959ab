"""FlashInfer's block-sparse attention on Blackwell: blocks of 64 tokens, 128 channels.

https://github.com/flashinfer-ai/flashinfer, ``flashinfer/cute_dsl/sparse``: one function for compute capability 10 and
one for 12, with the same arguments. Read at version 0.7.2.post1. Where it rounds a row's count up, it masks what it
added only if it is given the blocks' sizes, so it always is.
"""

from __future__ import annotations

import math
from typing import Any

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

NAME, PACKAGES = "flashinfer", ("flashinfer-python",)
_SIZE = 64
_INSTALL = "pip install flashinfer-python"
_LIMITS = {
    10: Limits("flashinfer.cute_dsl.sparse", _INSTALL, (10,), (torch.bfloat16,), (128,)),
    12: Limits("flashinfer.cute_dsl.sparse", _INSTALL, (12,), (torch.bfloat16, torch.float16), (128,)),
}
_EITHER = Limits("flashinfer.cute_dsl.sparse", _INSTALL, (10, 12), (torch.bfloat16, torch.float16), (128,))


def why_not(request: KernelRequest) -> str | None:
    """Why FlashInfer cannot run the request, or ``None``."""
    reason = _EITHER.why_not(request)
    return reason or _LIMITS[torch.cuda.get_device_capability()[0]].why_not(request)


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
        KernelError: if :func:`why_not` has a reason, or the mask has a rule over tokens.
    """
    check_inputs(q, k, v, layout, mask)
    reason = why_not(KernelRequest.of(q, precision, tail=tail, return_lse=return_lse, skip=skips is not None))
    if reason or mask.rule is not None:
        raise KernelError(f"FlashInfer cannot run this: {reason or 'it keeps whole blocks, and a rule cuts some'}")
    pieces = pieces_of(layout, _SIZE, q.device)
    counts, index = pieces.lists(mask.to(q.device), q.shape[0], q.shape[2])
    out, _ = _function()(
        *(pieces.pad(x) for x in (q, k, v)), index, index.shape[-1], block_sizes=pieces.lengths, q2k_block_nums=counts,
        softmax_scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )  # fmt: skip
    return pieces.unpad(out)


def _function() -> Any:
    """The one for the current device."""
    if torch.cuda.get_device_capability()[0] == 10:
        from flashinfer.cute_dsl.sparse.bsa_attn_sm100_blk64 import bsa_attn_sm100_blk64_fwd

        return bsa_attn_sm100_blk64_fwd
    from flashinfer.cute_dsl.sparse.bsa_attn_sm120 import bsa_attn_sm120_blk64_fwd

    return bsa_attn_sm120_blk64_fwd
