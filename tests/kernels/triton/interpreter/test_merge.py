"""The merge kernel on the interpreter, against attention in float64 over all keys at once."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vidaccel.errors import KernelError, LayoutError
from vidaccel.kernels import merge as oracle
from vidaccel.kernels.triton.merge import merge, merge_all

EPS = torch.finfo(torch.float32).eps
Parts = tuple[list[torch.Tensor], list[torch.Tensor]]


def exact(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights by a softmax over the parts, in float64; rows without keys are zeros."""
    lse = torch.stack(lses).double()
    weight = lse.softmax(0).nan_to_num(0.0).transpose(-1, -2).unsqueeze(-1)
    return (torch.stack(outs).double() * weight).sum(0), lse.logsumexp(0)


def parts(count: int, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Parts:
    """``count`` outputs and LSEs, no two with the same strides and none contiguous."""
    outs, lses = [], []
    for i, order in zip(range(count), itertools.cycle([(0, 1, 2, 3), (3, 0, 2, 1), (1, 2, 3, 0)])):
        shape = (batch, tokens, heads, dim)
        stored = torch.randn(*(shape[axis] for axis in order), 2 + i).to(dtype)[..., i]
        outs.append(stored.permute(*(order.index(axis) for axis in range(4))))
        lses.append((3 * torch.randn(batch, tokens, heads, 2)).unbind(-1)[i % 2].transpose(1, 2))
    return outs, lses


def assert_close(got: tuple[torch.Tensor, torch.Tensor], outs: list[torch.Tensor], lses: list[torch.Tensor]) -> None:
    out, lse = got
    want, want_lse = exact(outs, lses)
    assert out.dtype == outs[0].dtype and lse.dtype == torch.float32
    # each weight is rounded in its difference of LSEs, which are below 16, and in e^x; then P products are added
    largest = max(float(part.abs().max()) for part in outs)
    slack = (2 * 16 + len(outs) + 4) * EPS
    unit = torch.finfo(out.dtype).eps / 2 if out.dtype != torch.float32 else EPS
    assert ((out.double() - want).abs() <= slack * largest + unit * want.abs()).all()
    torch.testing.assert_close(lse.double(), want_lse, atol=slack, rtol=EPS)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dim", "dtype"),
    [(2, 37, 3, 64, torch.bfloat16), (1, 16, 1, 96, torch.float16), (2, 5, 3, 20, torch.float32)],
)
def test_any_number_of_parts(count: int, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    outs, lses = parts(count, batch, tokens, heads, dim, dtype)
    assert_close(merge_all(outs, lses), outs, lses)


@pytest.mark.representative
def test_two_parts_are_the_torch_version() -> None:
    (out0, out1), (lse0, lse1) = parts(2, 2, 33, 3, 64, torch.float32)
    lse0[0, 0, :7], lse1[1, 2, 3:9] = -math.inf, -math.inf
    out, lse = merge(out0, lse0, out1, lse1)
    wide = (x.transpose(1, 2) for x in (out0, out1))
    want, want_lse = oracle.merge(next(wide), lse0, next(wide), lse1)
    largest = float(torch.stack([out0, out1]).abs().max())
    torch.testing.assert_close(out, want.transpose(1, 2), atol=60 * EPS * largest, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=60 * EPS, rtol=EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_without_keys_counts_for_nothing(dtype: torch.dtype) -> None:
    """The other's output comes back to the last bit, though the empty part's memory was never written."""
    (full, empty), (lse, none) = parts(2, 1, 19, 2, 32, dtype)
    none[:], empty[:] = -math.inf, math.nan
    for got in (merge(full, lse, empty, none), merge(empty, none, full, lse), merge_all([full], [lse])):
        assert torch.equal(got[0], full) and torch.equal(got[1], lse)


@pytest.mark.representative
def test_rows_without_any_keys_are_zeros() -> None:
    outs, lses = parts(3, 2, 18, 2, 32, torch.float32)
    for out, lse in zip(outs, lses, strict=True):
        lse[1, 0, 5:], out[1, 5:, 0] = -math.inf, math.nan
    out, lse = merge_all(outs, lses)
    assert (out[1, 5:, 0] == 0).all() and lse[1, 0, 5:].isneginf().all()
    assert_close((out, lse), [part.nan_to_num(0.0) for part in outs], lses)


@pytest.mark.parametrize("shift", [3e4, -3e4])
def test_large_scores_do_not_overflow(shift: float) -> None:
    outs, lses = parts(2, 1, 17, 1, 32, torch.float32)
    lses = [(lse * 64).round() / 64 for lse in lses]  # so that the shift is exact
    out, lse = merge_all(outs, [lse + shift for lse in lses])
    plain, plain_lse = merge_all(outs, lses)
    assert torch.equal(out, plain)
    torch.testing.assert_close(lse - shift, plain_lse, atol=3e4 * EPS, rtol=0)


def test_merging_in_steps_is_merging_at_once() -> None:
    outs, lses = parts(4, 1, 20, 2, 64, torch.float32)
    left, right = merge(outs[0], lses[0], outs[1], lses[1]), merge(outs[2], lses[2], outs[3], lses[3])
    assert_close(merge(*left, *right), outs, lses)


def test_no_tokens() -> None:
    out, lse = merge_all([torch.zeros(2, 0, 3, 16)] * 2, [torch.zeros(2, 3, 0)] * 2)
    assert out.shape == (2, 0, 3, 16) and lse.shape == (2, 3, 0)


def test_what_does_not_fit_is_refused() -> None:
    out, lse = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 4)
    with pytest.raises(LayoutError, match="0 outputs and 0 LSEs"):
        merge_all([], [])
    with pytest.raises(LayoutError, match="one LSE with each output"):
        merge_all([out, out], [lse])
    with pytest.raises(LayoutError, match=r"LSEs \[B,H,S\]"):
        merge(out, lse, out, lse.transpose(1, 2))
    with pytest.raises(LayoutError, match=r"outputs are \[B,S,H,D\]"):
        merge_all([out[0]], [lse])
    with pytest.raises(KernelError, match="LSEs are torch.float32"):
        merge(out, lse, out, lse.double())
    with pytest.raises(KernelError, match="share one of"):
        merge(out, lse, out.half(), lse)
    with pytest.raises(KernelError, match="move all parts to one device"):
        merge(out, lse, out.to("meta"), lse)
