"""FlashAttention-4 with block sparsity, in CuTe: whole blocks of 128 tokens.

https://github.com/Dao-AILab/flash-attention, package ``flash-attn-4``. Read at version 4.0.0b36. Padding would need a
mask function in its own language, so blocks that are not all of 128 tokens are refused.
"""

from __future__ import annotations

import math

import torch

from ...blockmask import BlockMask, block_lists
from ...errors import KernelError
from ...layout import TokenLayout
from ...types import PRECISIONS, Precision
from ..contract import AttentionResult, KernelRequest, Skips, check_inputs
from ..gradient import forward_only
from .limits import Limits

__all__ = ["NAME", "PACKAGES", "block_sparse_attention", "why_not"]

NAME, PACKAGES = "flash-attention-4", ("flash-attn-4",)
_SIZE = 128
_LIMITS = Limits(
    "flash_attn.cute", "pip install flash-attn-4", (9, 10), (torch.bfloat16, torch.float16), (64, 96, 128)
)  # fmt: skip


def why_not(request: KernelRequest) -> str | None:
    """Why FlashAttention-4 cannot run the request, or ``None``."""
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
        KernelError: if :func:`why_not` has a reason, the mask has a rule over tokens, or a block is not of 128 tokens.
    """
    check_inputs(q, k, v, layout, mask)
    reason = why_not(KernelRequest.of(q, precision, tail=tail, return_lse=return_lse, skip=skips is not None))
    if mask.rule is not None:
        reason = reason or "it keeps whole blocks, and a rule cuts some"
    sizes = sorted(set(layout.block_sizes.tolist()))
    if sizes != [_SIZE]:
        reason = reason or f"it takes blocks of {_SIZE} tokens without padding, and these have {sizes}"
    if reason:
        raise KernelError(f"FlashAttention-4 cannot run this: {reason}")
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    counts, index = block_lists(mask.to(q.device).dense)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts), mask_block_idx=torch.zeros_like(index), full_block_cnt=counts,
        full_block_idx=index, block_size=(_SIZE, _SIZE),
    )  # fmt: skip
    made = flash_attn_func(
        q, k, v, softmax_scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale, block_sparse_tensors=blocks
    )
    out = made[0] if isinstance(made, tuple) else made
    assert isinstance(out, torch.Tensor)
    return out
