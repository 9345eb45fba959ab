"""Attention results over disjoint keys into the one over all of them, in one pass: one read of each, one write.

One program owns ``ROWS`` rows of one head. With o_i and l_i the output and natural-log LSE of part i::

    top = max(l_i)
    w_i = e^(l_i - top)
    out = sum(w_i o_i) / sum(w_i)
    lse = top + log(sum(w_i))

A part whose LSE is -inf had no keys: its output is not read, whatever it holds. The same merge as in flash-decoding
and ring attention; in torch it is :mod:`vidaccel.kernels.merge`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...errors import KernelError, LayoutError

__all__ = ["merge", "merge_all", "merge_parts"]

#: Rows of a program and its warps: one tile of float32 sums in registers, whatever the number of parts.
_ROWS = 16
_WARPS = 4

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def merge_parts(
    # tuples with an entry for each part: outputs [B,S,H,D], LSEs float32 [B,H,S], and their strides in elements
    outs,
    lses,
    out_strides,
    lse_strides,
    # out [B,S,H,D] and lse [B,H,S], contiguous
    out,
    lse,
    tokens,
    heads,
    # how
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    b = head // heads
    h = head % heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    channel = tl.arange(0, BLOCK_D)
    real = channel < D

    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(len(lses)):
        top = tl.maximum(top, _lse_of(lses[i], lse_strides[i], b, h, row, inside))
    anchor = tl.where(top == float("-inf"), 0.0, top)  # rows without any keys: -inf minus -inf would be NaN
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.static_range(len(lses)):
        weight = tl.exp(_lse_of(lses[i], lse_strides[i], b, h, row, inside) - anchor)
        total += weight
        strides = out_strides[i]
        rows = outs[i] + b * strides[0] + h * strides[2] + row * strides[1]
        wanted = (weight > 0)[:, None] & real[None, :]
        part = tl.load(rows[:, None] + channel[None, :].to(tl.int64) * strides[3], mask=wanted, other=0.0)
        acc += weight[:, None] * part.to(tl.float32)

    total = tl.where(total == 0, 1.0, total)  # no keys: zeros, and an LSE of -inf plus zero
    acc = acc / total[:, None]
    at = out + ((b * tokens + row) * heads + h)[:, None] * D + channel[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])
    tl.store(lse + head * tokens + row, top + tl.log(total), mask=inside)


@triton.jit
def _lse_of(lse, strides, b, h, row, inside):
    """LSE of a part's rows, [ROWS]; -inf past the end."""
    return tl.load(lse + b * strides[0] + h * strides[1] + row * strides[2], mask=inside, other=float("-inf"))


def merge(
    out0: torch.Tensor, lse0: torch.Tensor, out1: torch.Tensor, lse1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint key sets; see :func:`merge_all`."""
    return merge_all((out0, out1), (lse0, lse1))


def merge_all(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of disjoint key sets, from the attention over each.

    The kernel is compiled once for each number of parts.

    Args:
        outs: [B,S,H,D] each, any strides, in one dtype of bf16, fp16 and float32.
        lses: float32 [B,H,S] each, any strides, natural logarithms; -inf where a part had no keys, whose output there
            counts for nothing and may hold anything.

    Returns:
        The output [B,S,H,D] in the parts' dtype, computed in float32, and its LSE, float32 [B,H,S]: zeros and -inf
        where no part had keys. Both are new and contiguous.

    Raises:
        LayoutError: if the shapes do not fit together, or there is no part.
        KernelError: if the dtypes or devices do not.
    """
    _check(outs, lses)
    batch, tokens, heads, channels = outs[0].shape
    out = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=outs[0].device)
    lse = torch.empty(lses[0].shape, dtype=torch.float32, device=out.device)
    if not out.numel():
        return out, lse
    merge_parts[(triton.cdiv(tokens, _ROWS), batch * heads)](
        tuple(outs),
        tuple(lses),
        tuple(tuple(part.stride()) for part in outs),
        tuple(tuple(part.stride()) for part in lses),
        out,
        lse,
        tokens,
        heads,
        D=channels,
        BLOCK_D=triton.next_power_of_2(channels),
        ROWS=_ROWS,
        num_warps=_WARPS,
    )
    return out, lse


def _check(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> None:
    if not outs or len(outs) != len(lses):
        raise LayoutError(f"{len(outs)} outputs and {len(lses)} LSEs cannot be merged; pass one LSE with each output")
    first = outs[0]
    if first.dim() != 4:
        raise LayoutError(f"the first output is {tuple(first.shape)}; outputs are [B,S,H,D]")
    batch, tokens, heads, _ = first.shape
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != first.shape or lse.shape != (batch, heads, tokens):
            raise LayoutError(
                f"an output is {tuple(out.shape)} with an LSE {tuple(lse.shape)}, but the first output is "
                f"{tuple(first.shape)}; all outputs are [B,S,H,D] and LSEs [B,H,S] of the same sizes"
            )
        if out.dtype != first.dtype or out.dtype not in _DTYPES or lse.dtype != torch.float32:
            raise KernelError(
                f"an output is {out.dtype} with an LSE in {lse.dtype}, and the first output {first.dtype}; outputs "
                f"share one of {', '.join(map(str, _DTYPES))}, and LSEs are torch.float32"
            )
        if out.device != first.device or lse.device != first.device:
            raise KernelError(
                f"an output is on {out.device} with its LSE on {lse.device}, and the first output on {first.device}; "
                "move all parts to one device"
            )
