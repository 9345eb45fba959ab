"""Attention over blocks of variable size: gather the kept keys of one query block, run SDPA on them, put the rows back.

The way of :mod:`.torch_sparse` where heads share no blocks: one block of one head at a time. Also here is what the
definition says, in float64 with every score in memory: the oracle.
"""

from __future__ import annotations

import math

import torch

from ..errors import KernelError, LayoutError
from ..types import PRECISIONS, Precision
from ..variablemask import VariableBlockMask, block_of_token
from . import kmeans
from .contract import AttentionResult, Skips, check_tensors
from .dense import attention_with_lse
from .kmeans import Means
from .merge import merge
from .tail import pooled_tail

__all__ = ["check_call", "oracle", "variable_block_attention", "variable_means"]


def variable_block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: VariableBlockMask,
    *,
    scale: float | None = None,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
    return_lse: bool = False,
    skips: Skips | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps.

    Args:
        q, k, v: [B,S,H,D] in the order of the mask's blocks, any strides.
        scale, tail, return_lse: as :class:`.contract.Kernel` has them; means are those of the mask's key blocks.
        precision, skips: only ``native`` and ``None``.

    Returns:
        The output [B,S,H,D] in q's dtype and, if asked, the LSE [B,H,S].

    Raises:
        LayoutError: if shapes and mask do not fit together.
        KernelError: for a quantised precision, or skips.
    """
    scale = check_call(q, k, v, mask, scale, precision, skips)
    means = (variable_means(k, mask.kv_sizes), variable_means(v, mask.kv_sizes)) if tail else None
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    log_sizes = mask.kv_sizes.float().log()
    kv_blocks = block_of_token(mask.kv_sizes)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        keep, start = mask.keep[b, h], 0
        skipped = ~keep & (mask.kv_sizes[b, h] > 0)
        some = skipped.any(-1).tolist()
        for i, size in enumerate(mask.q_sizes[b, h].tolist()):
            if not size:
                continue
            rows = (b, slice(h, h + 1), slice(start, start + size))
            keys, values = k[b, h], v[b, h]
            if some[i]:
                index = keep[i][kv_blocks[b, h]].nonzero().squeeze(-1)
                keys, values = keys.index_select(0, index), values.index_select(0, index)
            o, e = attention_with_lse(q[rows][None], keys[None, None], values[None, None], scale)
            o, e = o[0], e[0].float()
            if means is not None and some[i]:
                bias = log_sizes[b, h].masked_fill(~skipped[i], -math.inf)[None]
                of_head = (means[0][b, h][None], means[1][b, h][None])
                o, e = merge(o.float(), e, *pooled_tail(q[rows], *of_head, bias, scale))
            out[rows], lse[rows] = o.to(out.dtype), e
            start += size
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: VariableBlockMask,
    *,
    scale: float | None = None,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
    return_lse: bool = False,
    skips: Skips | None = None,
    out_dtype: torch.dtype | None = None,
) -> AttentionResult:
    """The same as its definition reads, in float64; arguments as :func:`variable_block_attention` has them.

    Args:
        out_dtype: dtype of the output, ``None`` for q's; the LSE comes in float64 if it is.
    """
    scale = check_call(q, k, v, mask, scale, precision, skips)
    out_dtype = q.dtype if out_dtype is None else out_dtype
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask.pairs(), -math.inf)
    if tail:
        kept, columns = mask.of_queries(), block_of_token(mask.kv_sizes)
        member = columns[..., None, :] == torch.arange(kept.shape[-1], device=q.device)[:, None]
        sizes = mask.kv_sizes.double()[..., None]
        k_means, v_means = (member.double() @ x / sizes.clamp(min=1) for x in (k, v))
        logits = (q @ k_means.mT * scale + sizes.mT.log()).masked_fill(kept, -math.inf)
        scores, v = torch.cat([scores, logits], dim=-1), torch.cat([v, v_means], dim=-2)
    out = (scores.softmax(-1) @ v).transpose(1, 2).to(out_dtype)
    lse = scores.logsumexp(-1)
    return (out, lse if out_dtype == torch.float64 else lse.float()) if return_lse else out


def variable_means(x: torch.Tensor, sizes: torch.Tensor, means: Means = kmeans.means) -> torch.Tensor:
    """Mean of each block of x [B,S,H,D], float32 [B,H,M,D] for sizes [B,H,M]; 0 where there is no block.

    Args:
        means: what computes them.
    """
    batch, tokens, heads, channels = x.shape
    in_order = torch.arange(tokens, device=x.device).expand(batch, heads, -1)
    offsets = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()
    nothing = torch.zeros(*sizes.shape, channels, dtype=torch.float32, device=x.device)
    return means(x, in_order, offsets, nothing)


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: VariableBlockMask,
    scale: float | None,
    precision: Precision,
    skips: Skips | None,
) -> float:
    """Checks what every kernel of variable blocks assumes, and returns the scale.

    Raises:
        LayoutError: if q, k and v are not three [B,S,H,D] tensors of one shape, or the mask's blocks are not theirs.
        KernelError: if q, k, v and the mask differ in dtype or device, for a quantised precision, or skips.
    """
    check_tensors(q, k, v)
    if mask.keep.device != q.device:
        raise KernelError(f"the mask is on {mask.keep.device} and q on {q.device}; move them to one device")
    batch, tokens, heads, channels = q.shape
    if (*mask.keep.shape[:2], mask.tokens) != (batch, heads, tokens):
        raise LayoutError(
            f"blocks of {mask.tokens} tokens in {mask.keep.shape[0]}x{mask.keep.shape[1]} (batch x heads) do not fit q"
            f" {tuple(q.shape)}; make the mask from these queries and keys"
        )
    if precision.quantised or skips is not None:
        what = f"precision {precision.name!r}" if precision.quantised else "skipping inside the kernel"
        raise KernelError(f"blocks of variable size are computed in the inputs' dtype and whole, not with {what}")
    return 1 / math.sqrt(channels) if scale is None else scale
