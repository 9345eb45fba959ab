"""Norm, rotary embedding and gather of q or k in one pass (:mod:`.rotation`), on request rounded to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import triton

from ...errors import KernelError
from ...layout import TokenLayout
from ..quantise import ROWS
from .means import block_sizes
from .preparation import room
from .rotation import rotate_rows
from .worklist import Pieces

__all__ = ["gather", "rotate_and_gather", "rotate_and_quantise", "rotate_with_means"]

#: Rows of a program: their rotations and one head of them fit into the registers of four warps.
_ROWS = 16
#: Most rows that can share a scale: they are one program's.
_MOST_ROWS = 128


def warps_for(rows: int) -> int:
    """Warps of a program of so many rows: 128 rows of 128 channels take 96 registers of each of 512 threads."""
    return max(4, rows // 8)


@dataclass(frozen=True)
class _Shape:
    """How the result is cut into programs.

    Args:
        layout: pieces are parts of its blocks and leave their sums; ``None`` for one run of rows.
        rows: most rows of a piece.
        rounding: "no", "int8" or "fp8" with a scale a piece.
    """

    layout: TokenLayout | None = None
    rows: int = _ROWS
    rounding: Literal["no", "int8", "fp8"] = "no"


def rotate_and_gather(
    x: torch.Tensor,
    order: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    style: Literal["interleaved", "half"] = "interleaved",
    tables: Literal["result", "source"] = "result",
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """RMS norm and RoPE of rows of ``x`` in the order that attention wants.

    Args:
        x: [B,S,H,D], any strides.
        order: int32 [S'], [B,S'] or [B,H,S'], the row of ``x`` for each row of the result, -1 for a row of zeros; for
            example ``layout.order.int()``. ``None`` keeps the rows where they are. Entries are not checked: reading
            them would wait for the device.
        cos, sin: [S',D] or, with ``tables="source"``, [S,D]; ``None`` for no rotation. Each channel has its own entry,
            as in diffusers' ``apply_rotary_emb``; with D/2 columns each pair has, which is half as much to read. Rows
            of ones and zeros leave text tokens alone.
        style: whether pairs are neighbours (Wan, HunyuanVideo, CogVideoX) or halves of the head (LLaMA).
        tables: whether row i of the tables belongs to row i of the result, or of ``x``.
        norm_weight: [D] to normalise each head, [H*D] to normalise all heads of a token together (Wan), ``None`` for
            no norm. With one head the two are the same.
        eps: what the norm adds to the mean square.

    Returns:
        [B,S',H,D] in x's dtype, with rows of channels at multiples of 16 bytes; float32 throughout, rounded once.

    Raises:
        KernelError: if shapes, dtypes or devices do not fit together.
    """
    return _rotate(x, order, cos, sin, style, tables, norm_weight, eps, _Shape())[0]


def rotate_with_means(
    x: torch.Tensor,
    layout: TokenLayout,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    style: Literal["interleaved", "half"] = "interleaved",
    tables: Literal["result", "source"] = "result",
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rotate_and_gather` from raster into ``layout`` order, and the result's block means from the same pass.

    Returns:
        [B,S,H,D] in x's dtype, and the means of it before rounding, float32 [B,H,NB,D].

    Raises:
        KernelError: as :func:`rotate_and_gather`.
    """
    order = _order_of(layout, x.device)
    out, _, sums = _rotate(x, order, cos, sin, style, tables, norm_weight, eps, _Shape(layout))
    return out, _means(sums, layout, _ROWS)


def rotate_and_quantise(
    x: torch.Tensor,
    layout: TokenLayout,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    number_format: Literal["int8", "fp8"],
    granularity: Literal["block", "rows32"],
    *,
    style: Literal["interleaved", "half"] = "interleaved",
    tables: Literal["result", "source"] = "result",
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`rotate_with_means` whose result leaves in 8 bits: everything between the projection and attention at once.

    The result is not rounded to x's dtype in between, so it is a little closer to the exact one than in two steps.
    It has the scales that the forward kernel reads, and cannot be smoothed, which needs a mean beforehand.

    Returns:
        int8 or float8_e4m3fn [B,S,H,D]; its scales, one per row, float32 [B,H,S]; block means float32 [B,H,NB,D].

    Raises:
        KernelError: as :func:`rotate_and_gather`; if a scale is to serve more than 128 rows, or more than 64 with
            tables of D columns, which would not fit into registers.
    """
    most = ROWS if granularity == "rows32" else int(layout.block_sizes.max())
    limit = _MOST_ROWS if cos is None or cos.shape[-1] < x.shape[-1] else _MOST_ROWS // 2
    if most > limit or granularity not in ("block", "rows32") or number_format not in ("int8", "fp8"):
        raise KernelError(
            f"{number_format} with a scale for {granularity} of {most} rows; valid are int8 and fp8 with rows32, or"
            f" with block where blocks have at most {limit} tokens ({_MOST_ROWS} with tables of D/2 columns); else"
            " rotate first, then quantise"
        )
    order = _order_of(layout, x.device)
    shape = _Shape(layout, most, number_format)
    out, scale, sums = _rotate(x, order, cos, sin, style, tables, norm_weight, eps, shape)
    return out, scale, _means(sums, layout, most)


def gather(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` [B,S,H,D] in ``order`` int32 [S'], [B,S'] or [B,H,S'], -1 for a row of zeros: [B,S',H,D].

    Raises:
        KernelError: as :func:`rotate_and_gather`.
    """
    return rotate_and_gather(x, order, None, None)


def _rotate(
    x: torch.Tensor,
    order: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    style: str,
    tables: str,
    weight: torch.Tensor | None,
    eps: float,
    shape: _Shape,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result; its scales, where it has any; and, for a layout, the sums of each of the NP pieces, float32
    [B,H,NP + 1,D], where the last one is zero."""
    _check(x, order, cos, sin, style, tables, weight, shape.layout)
    batch, tokens, heads, channels = x.shape
    length = tokens if order is None else order.shape[-1]
    pieces = _pieces(length, shape.layout, shape.rows, x.device)
    dtype = {"no": x.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[shape.rounding]
    out = room((batch, length, heads, channels), dtype, x.device)
    scale = sums = none = out  # stands in for a tensor that this variant does not touch
    if shape.rounding != "no":
        scale = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    if shape.layout is not None:
        sums = torch.empty(batch, heads, len(pieces) + 1, channels, dtype=torch.float32, device=x.device)
        sums[:, :, -1] = 0
    if length == 0:
        return out, scale, sums
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    per_head = order is not None and order.dim() == 3 and heads > 1
    rows = max(_ROWS, triton.next_power_of_2(shape.rows))
    rotate_rows[(len(pieces), batch, heads if per_head else 1)](
        x,
        out,
        scale,
        none if order is None else order.contiguous(),
        none if cos is None else cos,
        none if sin is None else sin,
        none if weight is None else weight.contiguous(),
        sums,
        pieces.start,
        pieces.length,
        *x.stride(),
        *out.stride()[:3],
        *_order_strides(order),
        0 if cos is None else cos.shape[-1],
        length,
        heads,
        len(pieces),
        eps,
        D=channels,
        HALF=max(1, triton.next_power_of_2(channels) // 2),
        ROWS=rows,
        ORDER=order is not None,
        ORDER_PER_HEAD=per_head,
        ROTATE=cos is not None,
        HALVES=style == "half" and cos is not None,
        SOURCE_TABLES=tables == "source",
        PAIR_TABLES=cos is not None and cos.shape[-1] < channels,
        NORM="none" if weight is None else "head" if len(weight) == channels else "row",
        MEANS=shape.layout is not None,
        ROUND=shape.rounding,
        num_warps=warps_for(rows),
    )
    return out, scale, sums


def _means(sums: torch.Tensor, layout: TokenLayout, rows: int) -> torch.Tensor:
    """Block means [B,H,NB,D] from the sums of pieces of at most ``rows`` rows."""
    totals = sums[:, :, _pieces_of_blocks(layout, rows, sums.device)].sum(3)
    return totals / block_sizes(layout, sums.device)[:, None]


def _check(
    x: torch.Tensor,
    order: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    style: str,
    tables: str,
    weight: torch.Tensor | None,
    layout: TokenLayout | None,
) -> None:
    if x.dim() != 4 or (layout is not None and x.shape[1] != layout.tokens):
        raise KernelError(f"x is {tuple(x.shape)}; give [B,{'S' if layout is None else layout.tokens},H,D]")
    if style not in ("interleaved", "half") or tables not in ("result", "source"):
        raise KernelError(
            f"style is {style!r} and tables is {tables!r}; valid are interleaved or half, and result or source"
        )
    batch, tokens, heads, channels = x.shape
    length = tokens
    if order is not None:
        length = order.shape[-1]
        fits = tuple(order.shape[:-1]) in ((), (batch,), (batch, heads)) and order.dim() > 0
        if not fits or order.dtype != torch.int32:
            raise KernelError(
                f"order is {order.dtype} {tuple(order.shape)}; for x of {tuple(x.shape)} give int32 [S'],"
                f" [{batch},S'] or [{batch},{heads},S']"
            )
    if (cos is None) != (sin is None):
        raise KernelError("one of cos and sin is missing; give both or neither")
    if cos is not None and sin is not None:
        rows = length if tables == "result" else tokens
        sizes = ((rows, channels), (rows, channels // 2))
        if tuple(cos.shape) not in sizes or sin.shape != cos.shape or channels % 2:
            raise KernelError(
                f"cos and sin are {tuple(cos.shape)} and {tuple(sin.shape)}; for tables={tables!r} give both as"
                f" [{rows},{channels}] or [{rows},{channels // 2}], with an even number of channels"
            )
    if weight is not None:
        if weight.dim() != 1 or len(weight) not in (channels, heads * channels):
            raise KernelError(
                f"norm_weight is {tuple(weight.shape)}; give [{channels}] for a norm of each head or"
                f" [{heads * channels}] for one of all heads together"
            )
        if order is not None and order.dim() == 3 and len(weight) != channels:
            raise KernelError(
                "a norm of all heads together and an order for each head are given, but a row of the result has other"
                " tokens in each head; normalise first, then gather"
            )
    others = {other.device for other in (order, cos, sin, weight) if other is not None}
    if others - {x.device}:
        raise KernelError(
            f"x is on {x.device}, other tensors on {', '.join(map(str, others))}; move them to x's device"
        )


def _order_strides(order: torch.Tensor | None) -> tuple[int, int]:
    """Distance of the orders of two batch entries and of two heads, 0 where they share one."""
    if order is None or order.dim() == 1:
        return 0, 0
    length = order.shape[-1]
    return (length, 0) if order.dim() == 2 else (order.shape[1] * length, length)


@lru_cache(maxsize=64)
def _pieces(length: int, layout: TokenLayout | None, rows: int, device: torch.device) -> Pieces:
    """What each program owns: rows of the result, and with a layout rows of one block."""
    offsets = torch.tensor([0, length]) if layout is None else layout.block_offsets
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        return Pieces.of(offsets, rows).to(device)


@lru_cache(maxsize=64)
def _pieces_of_blocks(layout: TokenLayout, rows: int, device: torch.device) -> torch.Tensor:
    """The pieces of each block, filled up with the number of all pieces: int64 [NB, most pieces of a block]."""
    with torch.inference_mode(False):
        counts = (layout.block_sizes + rows - 1) // rows
        index = torch.arange(int(counts.max()))
        first = counts.cumsum(0) - counts
        return torch.where(index < counts[:, None], first[:, None] + index, counts.sum()).to(device)


@lru_cache(maxsize=64)
def _order_of(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """The layout's order as kernels read it."""
    with torch.inference_mode(False):
        return layout.order.to(device=device, dtype=torch.int32)
