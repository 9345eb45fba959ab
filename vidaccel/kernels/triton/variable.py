"""Blocks of variable size through the forward kernel: all heads as one long sequence of pieces.

The kernel knows pieces of one sequence and lists of them (:mod:`.worklist`), the same pieces for every head. Heads with
blocks of their own lie in memory one behind the other, [B*H*S, D], as a single head whose queries list keys of their
own stretch alone. Nothing in the kernel changes: it is the variant in which every key and mean has a bias, with one
block of zeros for all keys.
"""

from __future__ import annotations

import torch

from ...blockmask import block_lists
from ...types import PRECISIONS, Precision
from ...variablemask import VariableBlockMask
from ..contract import AttentionResult, Skips
from ..variable import check_call, variable_means
from .configs import Config, arch_of, choose, kind_of
from .kmeans import means
from .launch import check_scale, run_forward
from .preparation import Prepared, room
from .worklist import Pieces, WorkList

__all__ = ["launch", "worklist"]


def launch(
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
    config: Config | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; as :func:`..variable.variable_block_attention` has it.

    Args:
        config: tile sizes and warps, ``None`` for this device's own.

    Raises:
        LayoutError: if shapes and mask do not fit together.
        KernelError: if ``scale`` is not positive, for a quantised precision, or skips.
    """
    scale = check_scale(check_call(q, k, v, mask, scale, precision, skips))
    batch, tokens, heads, channels = q.shape
    if config is None:
        typical = -(-tokens // mask.q_sizes.shape[-1])
        config = choose(arch_of(q.device), kind_of(q.dtype, precision), channels, typical)
    work = worklist(mask, config.block_m, config.block_n, tail=tail)
    behind = [variable_means(x, mask.kv_sizes, means) if tail else None for x in (k, v)]
    ready = Prepared(_stacked(q), _stacked(k, behind[0]), _stacked(v, behind[1]))
    out = room(ready.q.shape, q.dtype, q.device)
    lse = torch.empty(1, 1, ready.q.shape[1] if return_lse else 0, dtype=torch.float32, device=q.device)
    run_forward(ready, out, lse, work, work.bias, precision, scale, None, config, every_key=tail, blocks=0)
    out = out[0, :, 0].unflatten(0, (batch, heads, tokens)).transpose(1, 2)
    return (out, lse.view(batch, heads, tokens)) if return_lse else out


def worklist(mask: VariableBlockMask, block_m: int, block_n: int, *, tail: bool) -> WorkList:
    """The work of all heads as that of one; blocks, pieces and rows are numbered through all of them.

    Rows of keys are those that :func:`_stacked` makes: with ``tail`` each head's MK block means follow its keys. In
    ``bias``, float32 [B*H*MQ, (1 + NT) * block_n] or ``None``, the first ``block_n`` columns are zeros, for all keys,
    and behind them is log2 of each skipped block's tokens, or -inf.
    """
    device, tokens = mask.keep.device, mask.tokens
    keep, sizes = mask.keep.flatten(0, 1), mask.kv_sizes.flatten(0, 1)  # [G,MQ,MK] and [G,MK] for G = B*H
    groups, _, blocks = keep.shape
    q, k = (_pieces(x.flatten(), most) for x, most in ((mask.q_sizes, block_m), (mask.kv_sizes, block_n)))
    head, exact = k.block // blocks, len(k)
    counts = head.bincount(minlength=groups)
    first = counts.cumsum(0) - counts  # number of each head's first piece
    most = int(counts.max())
    block_of_piece = torch.full((groups, most), blocks)  # of a head, and one more that nobody keeps
    block_of_piece[head, torch.arange(exact) - first[head]] = k.block % blocks
    lists = torch.nn.functional.pad(keep, (0, 1)).gather(2, _per_row(block_of_piece.to(device), keep))
    aligned, bias, stretches = torch.zeros(exact, dtype=torch.int64), None, 0
    if tail:
        k = Pieces(k.start + head * blocks, k.length, k.block)
        stretches = -(-blocks // block_n)
        bias = torch.full((*keep.shape[:2], (1 + stretches) * block_n), -torch.inf, device=device)
        bias[..., :block_n] = 0.0
        logs = _per_row(sizes.float().log2(), keep)  # -inf where there is no block
        bias[..., block_n : block_n + blocks] = logs.masked_fill(keep, -torch.inf)
        wanted = torch.isfinite(bias[..., block_n:]).unflatten(-1, (stretches, block_n)).any(-1)
        lists = torch.cat([lists, wanted], dim=-1)
        stretch = torch.arange(stretches).repeat(groups)
        start = torch.arange(groups).repeat_interleave(stretches) * (tokens + blocks) + tokens + stretch * block_n
        length = (blocks - stretch * block_n).clamp(max=block_n)
        k = Pieces(*(torch.cat(x) for x in ((k.start, start), (k.length, length), (k.block, stretch))))
        aligned = torch.cat([aligned, (1 + stretch) * block_n])
    length, index = block_lists(lists)
    rows, length = q.block.to(device), length.flatten()
    # a head's own numbers become those of all heads: 0 to most - 1 are its keys, the others its means
    shift = torch.stack([first, exact + torch.arange(groups) * stretches - most])
    shift = shift.to(device=device, dtype=torch.int32)[..., None, None]
    index = index[..., : int(length[rows].max())]
    index = torch.where(index < most, index + shift[0], index + shift[1]).flatten(0, 1)
    length = length[rows]
    return WorkList(
        q=q.to(device),
        k=k.to(device),
        k_aligned=aligned.to(device=device, dtype=torch.int32),
        exact=exact,
        kv_num=length[None, None],
        kv_index=index[rows][None, None],
        order=length.argsort(descending=True, stable=True).to(torch.int32),
        bias=None if bias is None else bias.flatten(0, 1),
        ragged=True,
        rule=None,
    )


def _pieces(sizes: torch.Tensor, most: int) -> Pieces:
    """Blocks of these sizes, one behind the other, in pieces of at most ``most`` rows; on the CPU."""
    return Pieces.of(torch.nn.functional.pad(sizes.cpu().cumsum(0), (1, 0)), most)


def _per_row(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """x [G,N] the same for each of the MQ rows of a head: [G,MQ,N]."""
    return x[:, None].expand(-1, keep.shape[1], -1)


def _stacked(x: torch.Tensor, means: torch.Tensor | None = None) -> torch.Tensor:
    """x [B,S,H,D] head after head, each with its means [B,H,M,D] behind it: [1, B*H*(S+M), 1, D]."""
    rows = x.transpose(1, 2)
    addressable = rows.data_ptr() % 16 == 0 and rows.stride(-2) * x.element_size() % 16 == 0
    if means is not None or not (addressable and rows.is_contiguous()):
        batch, heads, tokens, channels = rows.shape
        more = 0 if means is None else means.shape[2]
        made = room((batch, heads, tokens + more, channels), x.dtype, x.device)
        made[:, :, :tokens] = rows
        if means is not None:
            made[:, :, tokens:] = means
        rows = made
    return rows.flatten(0, 2)[None, :, None]
