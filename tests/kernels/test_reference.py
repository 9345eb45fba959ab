"""The oracle against brute force: Python loops over tokens, scores and roundings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.helpers import make_layout, random_mask, random_qkv
from tests.rounding import assert_rounded, rounding
from vidaccel.blockmask import BlockMask
from vidaccel.errors import KernelError, LayoutError
from vidaccel.kernels import emulated
from vidaccel.kernels.contract import KernelRequest, Skips
from vidaccel.kernels.quantise import quantise, quantise_channels, quantise_weights, row_groups
from vidaccel.kernels.reference import block_sparse_attention, why_not
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, Precision

LAYOUT = make_layout((2, 5, 7), (2, 3, 4), text=5)
NATIVE = PRECISIONS["native"]


def exact(precision: Precision = NATIVE, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, LSE) in float64 on fixed inputs, and on a mask fixed by the seed."""
    q, k, v, mask = inputs()
    result = block_sparse_attention(
        q, k, v, LAYOUT, mask, precision=precision, return_lse=True, out_dtype=torch.float64, **kwargs
    )
    assert isinstance(result, tuple)
    return result


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask]:
    torch.manual_seed(3)
    return *random_qkv(LAYOUT, 1, 2, 8), random_mask(LAYOUT, 1, [0.3, 0.6])


@pytest.mark.parametrize("use_tail", [False, True], ids=["dropped", "tail"])
def test_brute_force(use_tail: bool) -> None:
    q, k, v, mask = inputs()
    got, lse = exact(tail=use_tail)
    offsets, sizes = LAYOUT.block_offsets.tolist(), LAYOUT.block_sizes.tolist()
    scale = 1 / math.sqrt(8)
    for h in range(2):
        for s in range(0, LAYOUT.tokens, 3):
            total, summed = 0.0, torch.zeros(8, dtype=torch.float64)
            for j, (start, size) in enumerate(zip(offsets, sizes, strict=False)):
                keys, values = (x[0, start : start + size, h].double() for x in (k, v))
                pairs: list[tuple[torch.Tensor, torch.Tensor, float]] = []
                if mask.dense[0, h, LAYOUT.block_of_token[s], j]:
                    pairs = [(keys[t], values[t], 1.0) for t in range(size)]
                elif use_tail:
                    pairs = [(keys.mean(0), values.mean(0), float(size))]
                for key, value, count in pairs:
                    weight = count * math.exp(scale * float(q[0, s, h].double() @ key))
                    total, summed = total + weight, summed + weight * value
            torch.testing.assert_close(got[0, s, h], summed / total, rtol=1e-9, atol=1e-9)
            assert math.isclose(lse[0, h, s].item(), math.log(total), rel_tol=1e-9)


def test_token_mask() -> None:
    """A causal token mask on top of full blocks is causal attention."""
    q, k, v, _ = inputs()
    causal = torch.ones(LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool).tril()
    got = block_sparse_attention(q, k, v, LAYOUT, BlockMask.full(LAYOUT), token_mask=causal)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert_rounded(got, want.transpose(1, 2), rounding(q, k, v).out)
    with pytest.raises(LayoutError, match="without any key"):
        block_sparse_attention(q, k, v, LAYOUT, BlockMask.full(LAYOUT), token_mask=torch.zeros_like(causal))


SMOOTHED = [
    Precision("int8", qk="int8"),
    Precision("int8-k", qk="int8", smooth_k=True),
    Precision("int8-qk", qk="int8", smooth_k=True, smooth_q=True),
    Precision("fp8-v", qk="fp8", pv="fp8", granularity="tensor", smooth_v=True),
    *KERNEL_PRECISIONS.values(),  # the others: test_few_bits.py
]


@pytest.mark.parametrize("precision", SMOOTHED, ids=lambda p: p.name)
def test_quantised_formula_of_one_row(precision: Precision) -> None:
    """One row at a time: smooth, round, add back what smoothing took, weigh, round the weights."""
    q, k, v, mask = inputs()
    got, lse = exact(precision)
    scale, allowed = 1 / math.sqrt(8), rounding(q, k, v)  # means and scales are float32
    groups = row_groups(LAYOUT, precision.granularity)
    for h in range(2):
        keys, values = k[0, :, h], v[0, :, h]
        k_mean = keys.mean(0) if precision.smooth_k else torch.zeros(8)
        v_mean = values.mean(0) if precision.smooth_v else torch.zeros(8)
        smooth_keys = keys - k_mean
        # the mean of each row's own block, for the rows of that block
        q_means = torch.stack([q[0, LAYOUT.block_of_token == b, h].mean(0) for b in LAYOUT.block_of_token])
        q_means = q_means if precision.smooth_q else torch.zeros_like(q_means)
        rest = q[0, :, h] - q_means
        rounded_q, rounded_k, rounded_v = rest.double(), smooth_keys.double(), values.double()
        if precision.qk != "native":
            rounded_q, rounded_k = (
                quantise(x, groups, precision.qk).dequantise(torch.float64) for x in (rest, smooth_keys)
            )
        if precision.pv == "fp8":
            rounded_v = quantise_channels(values - v_mean).dequantise(torch.float64)
        for s in range(0, LAYOUT.tokens, 5):
            kept = mask.token_mask(LAYOUT)[0, h, s]
            scores = scale * (rounded_k @ rounded_q[s] + smooth_keys.double() @ q_means[s].double())[kept]
            weights = (scores - scores.max()).exp()
            total = weights.sum()
            if precision.pv == "fp8":
                weights = quantise_weights(weights).dequantise(torch.float64)
            want = (weights @ rounded_v[kept]) / total + v_mean.double()
            assert_rounded(got[0, s, h], want, allowed.out)
            want_lse = scores.max() + total.log() + scale * (q[0, s, h].double() @ k_mean.double())
            assert_rounded(lse[0, h, s], want_lse, allowed.lse)


def error(precision: Precision, shift: float, use_tail: bool = False) -> float:
    """Relative L2 error against native, on keys with a mean of ``shift``."""
    torch.manual_seed(1)
    layout = make_layout((4, 8, 8), (4, 4, 4))
    q, k, v = random_qkv(layout, 1, 2, 32)
    # channels of unlike means: what smoothing is for
    q, k, v = (x + shift * torch.randn(1, 1, 2, 32) for x in (q, k, v))
    mask = random_mask(layout, 1, [0.4])
    want, got = (
        block_sparse_attention(q, k, v, layout, mask, precision=p, tail=use_tail, out_dtype=torch.float64)
        for p in (NATIVE, precision)
    )
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("use_tail", [False, True], ids=["dropped", "tail"])
def test_error_grows_with_coarser_numbers(use_tail: bool) -> None:
    int8, fp8 = Precision("a", qk="int8"), Precision("b", qk="fp8")
    both = Precision("c", qk="fp8", pv="fp8")
    assert 0 < error(int8, 0.0, use_tail) < error(fp8, 0.0, use_tail) < error(both, 0.0, use_tail) < 0.1


def test_finer_scales_have_less_error() -> None:
    by_granularity = [error(Precision("x", qk="int8", granularity=g), 0.0) for g in ("tensor", "block", "rows32")]  # type: ignore[arg-type]
    assert by_granularity == sorted(by_granularity, reverse=True)


def test_smoothing_removes_error_where_channels_have_means() -> None:
    plain = Precision("x", qk="int8")
    k = replace(plain, smooth_k=True)
    both = replace(k, smooth_q=True)
    assert error(plain, 3.0) > 1.5 * error(k, 3.0) > 1.5 * error(both, 3.0)
    v = replace(both, pv="fp8")
    assert error(v, 3.0) > 1.5 * error(replace(v, smooth_v=True), 3.0)


def test_smoothing_does_not_move_the_lse() -> None:
    """Every precision has the LSE of the same scores up to the rounding of q and k; K's mean alone is worth 0.5."""
    q, k, _, _ = inputs()
    _, want = exact()
    smoothed_away = (q * k.mean(1, keepdim=True)).sum(-1).abs().mean() / math.sqrt(8)
    assert smoothed_away > 0.5
    for precision in SMOOTHED:
        assert (exact(precision)[1] - want).abs().mean() < 0.05


def test_dtypes() -> None:
    q, k, v, mask = inputs()
    out, lse = block_sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), LAYOUT, mask, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    single = block_sparse_attention(q, k, v, LAYOUT, mask, compute_dtype=torch.float32)
    assert_rounded(single, block_sparse_attention(q, k, v, LAYOUT, mask), rounding(q, k, v).out)


def test_why_not() -> None:
    def request(device: str, dtype: torch.dtype = torch.float32) -> KernelRequest:
        return KernelRequest(device, dtype, 64, PRECISIONS["fp8-tile"], True, True)

    assert why_not(request("cpu")) is None
    assert "float64" in str(why_not(request("mps")))
    assert "floating" in str(why_not(request("cpu", torch.int8)))
    assert "meta" in str(why_not(request("meta")))
    q, _, _, mask = inputs()
    q = q.to(torch.int8)
    with pytest.raises(KernelError, match="not a floating dtype"):
        block_sparse_attention(q, q, q, LAYOUT, mask)


@pytest.mark.parametrize("threshold", [-0.1, -1.0, -math.inf])
def test_skips_by_brute_force(threshold: float) -> None:
    q, k, v, mask = inputs()
    limits = torch.tensor([threshold, 2 * threshold])
    skips = Skips.of(limits, q)
    out, lse = exact(skips=skips)
    edges = LAYOUT.block_offsets.tolist()
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) / math.sqrt(q.shape[-1])
    counts = torch.zeros(1, 2, dtype=torch.int64)
    for h in range(2):
        for i in range(LAYOUT.num_blocks):
            rows = slice(edges[i], edges[i + 1])
            seen = [-math.inf] * (rows.stop - rows.start)
            keys: list[int] = []
            for j in mask.dense[0, h, i].nonzero().flatten().tolist():
                columns = range(edges[j], edges[j + 1])
                best = [max(float(scores[0, h, r, c]) for c in columns) for r in range(rows.start, rows.stop)]
                seen = [max(a, b) for a, b in zip(seen, best, strict=True)]
                if max(a - b for a, b in zip(best, seen, strict=True)) < float(limits[h]):
                    counts[0, h] += (rows.stop - rows.start) * len(columns)
                else:
                    keys += columns
            part = scores[0, h, rows][:, keys]
            torch.testing.assert_close(out[0, rows, h], part.softmax(-1) @ v[0, keys, h].double())
            torch.testing.assert_close(lse[0, h, rows], part.logsumexp(-1))
    assert torch.equal(skips.skipped, counts)
    again = Skips.of(limits, q)
    emulation = emulated.block_sparse_attention(q, k, v, LAYOUT, mask, skips=again, return_lse=True)
    for found, wanted, allowed in zip(emulation, (out, lse), rounding(q, k, v), strict=True):
        assert_rounded(found, wanted, allowed)
    assert torch.equal(again.skipped, counts)
    if threshold == -0.1:
        assert counts.any()


def test_bad_skip_thresholds_are_named() -> None:
    q = inputs()[0]
    with pytest.raises(KernelError, match="3 skip thresholds for 2 heads"):
        Skips.of(torch.zeros(3), q)
    with pytest.raises(KernelError, match="at most 0"):
        Skips.of(0.5, q)
