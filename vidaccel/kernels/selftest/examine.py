"""Runs a kernel's hard cases and compares them with the float64 oracle, within what its roundings allow.

Needs no Triton; any callable can be examined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...blockmask import BlockMask
from ...layout import TokenLayout
from ...types import PRECISIONS, Precision, TileShape, VideoGrid
from .. import reference
from .cases import CASES, Case
from .verdicts import Verdict

__all__ = ["FillingKernel", "examine"]

#: Fills out [B,S,H,D] and lse [B,H,S]: kernel(q, k, v, layout, mask, out, lse, precision=..., tail=...).
FillingKernel = Callable[..., None]

#: Largest relative error of one rounding to nearest.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float8_e4m3fn: 2.0**-4}


def examine(
    kernel: FillingKernel,
    device: torch.device,
    cases: Sequence[Case] = CASES,
    progress: Callable[[str], None] = lambda case: None,
    *,
    with_lse: bool = True,
) -> Verdict:
    """Runs the cases until one is wrong. Every output begins as NaN and lies between rows that must stay NaN.

    Args:
        progress: takes the name of each case before it runs.
        with_lse: whether the kernel fills the LSE.
    """
    errors: dict[str, float] = {}
    for number, case in enumerate(cases):
        progress(case.name)
        wrong, errors[case.name] = _check(kernel, device, case, seed=number, with_lse=with_lse)
        if wrong:
            return Verdict("wrong", f"case {case.name!r}: {wrong}", errors)
    return Verdict("right", None, errors)


def _check(
    kernel: FillingKernel, device: torch.device, case: Case, *, seed: int, with_lse: bool
) -> tuple[str | None, float]:
    """What is wrong, and the largest error as a share of what is allowed."""
    layout = TokenLayout.of(VideoGrid(*case.grid), TileShape(*case.tile), text_tokens=case.text)
    random = torch.Generator().manual_seed(seed)
    n, heads = layout.num_blocks, len(case.densities)
    keep = torch.rand(case.batch, heads, n, n, generator=random) < torch.tensor(case.densities)[:, None, None]
    mask = BlockMask.from_dense(keep | torch.eye(n, dtype=torch.bool))
    shape = (case.batch, layout.tokens, heads, case.head_dim)
    # k and v have means, as real ones have; what lies around all three is NaN
    q, k, v = ((torch.randn(shape, generator=random) + shift).to(case.dtype) for shift in (0.0, 0.5, 0.3))
    operands = [_between_nan(x, device) for x in (q, k, v)]
    around = torch.full(
        (case.batch, layout.tokens + 2, heads, case.head_dim), math.nan, dtype=case.dtype, device=device
    )
    out = around[:, 1:-1]
    lse = torch.full((case.batch, heads, layout.tokens), math.nan, device=device)
    precision = PRECISIONS[case.precision]
    kernel(*operands, layout, mask.to(device), out, lse, precision=precision, tail=case.tail)
    made, made_lse, rim = out.cpu().double(), lse.cpu().double(), around.cpu()[:, [0, -1]]
    if not rim.isnan().all():
        return "rows outside of the output were written", math.inf
    missing = int((~made.isfinite()).sum()) + (int((~made_lse.isfinite()).sum()) if with_lse else 0)
    if missing:
        return f"{missing} values of the output and the LSE are not finite", math.inf
    share, share_lse = _shares(q, k, v, layout, mask, made, made_lse, precision, case.tail)
    share_lse = share_lse if with_lse else 0.0
    worst = max(share, share_lse)
    if not worst <= 1:
        what = "output" if share >= share_lse else "LSE"
        return f"the {what}'s error is {worst:.1f} times what its roundings allow", worst
    return None, worst


def _between_nan(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    batch, tokens, heads, channels = x.shape
    around = torch.full((batch, tokens + 2, heads, channels), math.nan, dtype=x.dtype, device=device)
    around[:, 1:-1] = x.to(device)
    return around[:, 1:-1]


def _shares(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    out: torch.Tensor,
    lse: torch.Tensor,
    precision: Precision,
    tail: bool,
) -> tuple[float, float]:
    """Largest error of the output and of the LSE, as shares of their bounds.

    A weight's relative error is at most that of rounding it, w, and twice the error E of a logit (its own and the
    sum's). So the output's is at most (w + 2E) sum(p |v|), which is the oracle's output for |v|, and its own rounding;
    the LSE's is at most E. Logits are sums of D products in units of at least 2^-21 of their size, or of 2^-12 in fp8,
    where tensor cores add four groups of products with 13 bits.
    """
    options: dict[str, Any] = {"return_lse": True, "out_dtype": torch.float64}
    exact, exact_lse = _oracle(q, k, v, layout, mask, tail=tail, **options)
    size = _largest_logit(q, k)
    finer = 2.0**-21 * math.sqrt(q.shape[-1])
    if not precision.quantised:
        unit = _ROUNDING[q.dtype]
        # means of keys and of values are rounded once more
        logit = size * (finer + (unit if tail else 0.0))
        weight = unit * (2 if tail else 1)
        amount, _ = _oracle(q, k, v.abs(), layout, mask, tail=tail, **options)
        bound = (weight + 2 * logit + 2.0**-16) * amount + unit * exact.abs() + 2.0**-24
        return float(((out - exact).abs() / bound).max()), float((lse - exact_lse).abs().max() / (logit + 2.0**-16))
    rounded, rounded_lse = _oracle(q, k, v, layout, mask, tail=tail, precision=precision, **options)
    logit = size * (finer + 4 * 2.0**-12) + _one_step(q, k, precision)
    if tail:
        # the oracle's tail is not rounded; rounding it costs no more than rounding the rest does
        dropped, _ = _oracle(q, k, v, layout, mask, precision=precision, **options)
        kept, _ = _oracle(q, k, v, layout, mask, **options)
        allowed = _distance(rounded, exact) + _distance(dropped, kept)
        logit += _rounding_of_logits(q, k, size, precision)
        return _distance(out, exact) / allowed, float((lse - exact_lse).abs().max() / logit)
    # as two independent roundings, on the whole no further apart than sqrt(2) times from the exact result
    share = _distance(out, rounded) / (1.42 * _distance(rounded, exact))
    if precision.pv in ("native", "fp8"):
        amount, _ = _oracle(q, k, v.abs(), layout, mask, precision=precision, **options)
        weight, small = _ROUNDING[q.dtype], 0.0
        if precision.pv == "fp8":
            # P is rounded to 4 bits here relative to the running maximum and there to the final one, the smallest
            # ones to a fixed 2^-10 of the 448 that stand for 1
            weight = 2 * _ROUNDING[torch.float8_e4m3fn]
            small = layout.tokens * 2 * 2.0**-10 / 448 * float(v.abs().max())
        bound = (weight + 2 * logit) * amount + small + _ROUNDING[q.dtype] * rounded.abs()
        share = max(share, float(((out - rounded).abs() / bound).max()))
    return share, float((lse - rounded_lse).abs().max() / (logit + 2.0**-16))


def _one_step(q: torch.Tensor, k: torch.Tensor, precision: Precision) -> float:
    """What a logit moves when one number is rounded to the other neighbor, because it lay between both in float32.

    In fp8 as well, but there the rounding of P hides it.
    """
    steps = {"int8": 127, "int4": 7}.get(precision.qk)
    if steps is None:
        return 0.0
    largest = float(q.abs().max()) * float((k - k.float().mean(1, keepdim=True)).abs().max())
    return 2 * largest / steps / math.sqrt(q.shape[-1])


def _rounding_of_logits(q: torch.Tensor, k: torch.Tensor, size: float, precision: Precision) -> float:
    """The most that rounding q and k to few bits moves a logit."""
    steps = {"int8": 127, "int4": 7}.get(precision.qk)
    if steps is None:  # relative to each number: half a unit in the last place of e4m3, or of e2m1
        return size * 2 * {"fp8": 2.0**-4, "nvfp4": 2.0**-2}.get(precision.qk, 1.0)
    sums = (float(x.float().abs().sum(-1).max()) for x in (q, k))
    (of_q, of_k), largest_q, largest_k = tuple(sums), float(q.abs().max()), float(k.abs().max())
    return (of_q * largest_k + of_k * largest_q) / (2 * steps) / math.sqrt(q.shape[-1])


def _oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, LSE) in float64; for |v| the absolute values keep their scale."""
    out, lse = reference.block_sparse_attention(q, k, v, layout, mask, **options)
    return out, lse


def _largest_logit(q: torch.Tensor, k: torch.Tensor) -> float:
    """Largest sum of |q_c k_c| over channels, scaled."""
    products = q.float().abs().transpose(1, 2) @ k.float().abs().transpose(1, 2).mT
    return float(products.max()) / math.sqrt(q.shape[-1])


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2."""
    return float((a - b).norm() / b.norm())
