"""Launches the block-sparse forward kernel: preparation, work list, configuration, one call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton

from ...blockmask import BlockMask
from ...errors import KernelError
from ...layout import TokenLayout
from ...types import PRECISIONS, Precision
from ..contract import AttentionResult, Skips, check_inputs
from ..quantise import ROWS
from . import hopper_launch
from .configs import Config, arch_of, for_rule
from .forward import block_sparse_forward
from .preparation import Prepared, append_means, prepare, room
from .tuned import config_for
from .worklist import WorkList, aligned_offsets, worklist

__all__ = ["check_scale", "launch", "run_forward"]

_LOG2_E = 1.0 / math.log(2.0)

#: How tensor cores multiply float32: as three tf32 products, which keeps its precision, or where Triton has no such
#: thing (AMD) on the ordinary cores.
FLOAT32_PRODUCT = "tf32x3" if torch.version.hip is None else "ieee"

#: Bytes of Q smoothing's term, query blocks x keys x heads: beyond it heads run one group after the other.
_MAX_BIAS = 1 << 30


def launch(
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
    config: Config | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; arguments as :class:`..contract.Kernel` has them.

    Args:
        config: tile sizes and warps, ``None`` for this device's own.

    Raises:
        LayoutError: if shapes and layout do not fit together.
        KernelError: if ``scale`` is not positive.
    """
    check_inputs(q, k, v, layout, mask)
    together = max(1, _MAX_BIAS // (4 * q.shape[0] * layout.num_blocks * int(aligned_offsets(layout)[-1])))
    if precision.smooth_q and together < q.shape[2]:
        options = {"scale": scale, "precision": precision, "tail": tail, "return_lse": return_lse, "config": config}
        return _by_heads(together, q, k, v, layout, mask, skips, **options)
    scale = check_scale(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    run = _run
    skip, rule = skips is not None, mask.rule is not None
    if config is None and hopper_launch.why_not(q, layout, precision, skip=skip, rule=rule) is None:
        config, run = hopper_launch.CONFIG, hopper_launch.run
    if config is None:
        config = config_for(q, layout, precision, skip=skip)
    if rule:
        config = for_rule(config, q.shape[-1], arch_of(q.device))
    batch, tokens, heads, _ = q.shape
    work = worklist(mask.to(q.device), layout, batch, heads, config.block_m, config.block_n, tail=tail)
    ready = _prepare(q, k, v, layout, precision, tail)
    out = room(q.shape, q.dtype, q.device)
    lse = torch.empty(batch, heads, tokens if return_lse else 0, dtype=torch.float32, device=q.device)
    # contiguous, whatever the caller's counts are
    counted = None if skips is None else Skips(skips.threshold, torch.zeros_like(skips.skipped).contiguous())
    run(ready, out, lse, work, layout, precision, scale, counted, config)
    if skips is not None and counted is not None:
        skips.skipped.add_(counted.skipped)
    if return_lse and ready.k_mean is not None:
        # K smoothing lowered every score of a row by scale * q.k_mean
        lse += scale * torch.einsum("bshd,bhd->bhs", q.float(), ready.k_mean)
    return (out, lse) if return_lse else out


def check_scale(scale: float) -> float:
    """The scale of the scores.

    Raises:
        KernelError: if it is not positive.
    """
    if not scale > 0:
        raise KernelError(f"scale is {scale}; the Triton kernel takes the maximum before scaling and needs it positive")
    return scale


def _by_heads(
    together: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    skips: Skips | None,
    **options: Any,
) -> AttentionResult:
    """:func:`launch` a few heads at a time."""
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for first in range(0, q.shape[2], together):
        heads = slice(first, first + together)
        counted = None if skips is None else Skips(skips.threshold[heads], torch.zeros_like(skips.skipped[:, heads]))
        result = launch(
            q[:, :, heads], k[:, :, heads], v[:, :, heads], layout, mask.of_heads(heads), skips=counted, **options
        )
        if skips is not None and counted is not None:
            skips.skipped[:, heads] += counted.skipped
        for parts, made in zip((outs, lses), result if isinstance(result, tuple) else (result,), strict=False):
            parts.append(made)
    whole = torch.cat(outs, dim=2)
    return (whole, torch.cat(lses, dim=1)) if options["return_lse"] else whole


def _prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, precision: Precision, tail: bool
) -> Prepared:
    """What the kernel reads: 8-bit copies where the precision wants them, block means behind the keys for a tail."""
    if precision.quantised:
        ready = prepare(q, k, v, layout, precision, tail=tail)
        return replace(ready, v=_addressable(ready.v))  # with 16-bit PV it may be the caller's own
    if tail:
        k, v = append_means(k, layout), append_means(v, layout)
    return Prepared(*(_addressable(x) for x in (q, k, v)))


def _full_bias(smoothed: torch.Tensor, work: WorkList, layout: TokenLayout, scale: float) -> torch.Tensor:
    """What is added to each score, in base-2 units: Q smoothing's term, and for block means the tail's as well.

    Args:
        smoothed: float32 [B,H,NB,S'], as :class:`.preparation.Prepared` has it.

    Returns:
        float32 [B * H * NB, columns], with each block's columns where :func:`.worklist.aligned_offsets` says.
    """
    batch, heads, blocks, rows = smoothed.shape
    offsets = aligned_offsets(layout)
    token = torch.arange(layout.tokens)
    column = offsets[layout.block_of_token.cpu()] + token - layout.block_offsets[layout.block_of_token.cpu()]
    column = torch.cat([column, offsets[-2] + torch.arange(rows - layout.tokens)]).to(smoothed.device)
    bias = smoothed.new_full((batch, heads, blocks, int(offsets[-1])), -math.inf)
    bias[..., column] = smoothed * (scale * _LOG2_E)
    if work.bias is not None:
        tail = work.bias[:-1, :blocks].view(*work.kv_num.shape[:2], blocks, blocks)
        bias[..., int(offsets[-2]) : int(offsets[-2]) + blocks] += tail
    return bias.flatten(0, 2)


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """``x`` [B,S,H,D], copied if a tensor descriptor could not address it.

    Descriptors need contiguous channels, and addresses and strides in multiples of 16 bytes.
    """
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else room(x.shape, x.dtype, x.device).copy_(x)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors that programs make; torch's allocations are aligned enough."""
    return torch.empty(size, dtype=torch.int8, device=torch.cuda.current_device())


def _run(
    ready: Prepared,
    out: torch.Tensor,
    lse: torch.Tensor,
    work: WorkList,
    layout: TokenLayout,
    precision: Precision,
    scale: float,
    skips: Skips | None,
    config: Config,
) -> None:
    smoothed = ready.bias is not None
    bias = work.bias if ready.bias is None else _full_bias(ready.bias, work, layout, scale)
    run_forward(
        ready, out, lse, work, bias, precision, scale, skips, config, every_key=smoothed, blocks=layout.num_blocks
    )


def run_forward(
    ready: Prepared,
    out: torch.Tensor,
    lse: torch.Tensor,
    work: WorkList,
    bias: torch.Tensor | None,
    precision: Precision,
    scale: float,
    skips: Skips | None,
    config: Config,
    *,
    every_key: bool,
    blocks: int,
) -> None:
    """One call of the kernel; fills ``out`` and, unless it is empty, ``lse``.

    Args:
        ready: what it reads.
        bias: added to the scores, in base-2 units: with ``every_key`` those of all keys, at the columns that
            ``work.k_aligned`` names, else of means only, as ``work.bias`` has it.
        blocks: rows of ``bias`` for one head.
    """
    _, tokens, heads, channels = ready.q.shape
    q, k, v = ready.q, ready.k, ready.v
    fp8_values = precision.pv == "fp8"
    pieces = len(work.q)
    wide_batch, wide_head = (0 if n == 1 else 1 for n in work.kv_num.shape[:2])
    triton.set_allocator(_scratch)
    rule = work.rule
    none = out  # stands in for a tensor that this precision does not read
    block_sparse_forward[(work.order.numel(),)](
        q,
        k,
        v,
        out,
        lse,
        none if ready.q_scale is None else ready.q_scale,
        none if ready.k_scale is None else ready.k_scale,
        none if ready.v_scale is None else ready.v_scale,
        none if ready.v_mean is None else ready.v_mean,
        work.q.start,
        work.q.length,
        work.q.block,
        work.k.start,
        work.k.length,
        work.k.block,
        work.k_aligned if fp8_values or every_key else work.k.start,
        work.kv_num,
        work.kv_index,
        work.order,
        none if bias is None else bias,
        *((none,) * 4 if rule is None else (rule.words, rule.query_place, rule.tile_place, rule.key_bits)),
        none if skips is None else (skips.threshold * _LOG2_E).expand(heads).contiguous(),
        none if skips is None else skips.skipped,
        *(q.stride(i) for i in (0, 1, 2)),
        *(k.stride(i) for i in (0, 1, 2)),
        *((v.stride(0), v.stride(2), v.stride(1)) if fp8_values else (v.stride(i) for i in (0, 1, 2))),
        *(out.stride(i) for i in (0, 1, 2)),
        wide_batch * work.kv_num.shape[1] * pieces,
        wide_head * pieces,
        tokens,
        k.shape[1],
        v.shape[-1],
        heads,
        pieces,
        blocks,
        work.exact,
        work.kv_index.shape[-1],
        *((0, 0) if bias is None else bias.shape),
        0 if rule is None or len(rule.words) == 1 else rule.words.shape[1],
        scale * _LOG2_E,
        D=channels,
        # the least that tensor cores multiply at once
        BLOCK_D=max(16 if precision.qk == "native" else 32, triton.next_power_of_2(channels)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        QK_8BIT=precision.qk != "native",
        PV_FP8=fp8_values,
        ROWS_PER_SCALE=ROWS if precision.granularity == "rows32" else max(config.block_m, config.block_n),
        V_MEAN=ready.v_mean is not None,
        RAGGED=work.ragged,
        BIAS=0 if bias is None else 2 if every_key else 1,
        RULE=rule is not None,
        SKIP=skips is not None,
        LSE=lse.numel() > 0,
        FLOAT32_PRODUCT=FLOAT32_PRODUCT,
        WARP_SPECIALIZE=config.warp_specialize,
        num_warps=config.warps,
        num_stages=config.stages,
    )
