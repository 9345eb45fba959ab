"""The preparation kernels on the interpreter, against the same preparation in torch."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from tests.kernels.helpers import make_layout
from tests.kernels.triton.rounding import rounds_twice, units
from vidaccel.errors import KernelError
from vidaccel.kernels.triton.means import block_offsets
from vidaccel.kernels.triton.preparation import (
    Prepared,
    append_in_torch,
    append_means,
    prepare,
    prepare_in_torch,
    room,
)
from vidaccel.kernels.triton.quantise import round_rows
from vidaccel.kernels.triton.worklist import aligned_offsets
from vidaccel.layout import TokenLayout
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, Precision

RAGGED = {"grid": (3, 5, 6), "tile": (2, 4, 4)}
RECIPES = {name: precision for name, precision in KERNEL_PRECISIONS.items() if precision.quantised}
RECIPES["smooth all"] = Precision("smooth all", "int8", "fp8", "rows32", smooth_k=True, smooth_q=True, smooth_v=True)
RECIPES["tensor"] = Precision("tensor", "fp8", "fp8", "tensor", smooth_k=True, smooth_v=True)
RECIPES["tensor, smooth q"] = Precision("tensor, smooth q", "int8", "native", "tensor", smooth_q=True)
RECIPES["plain"] = Precision("plain", "int8", granularity="block")
RECIPES["block, smooth q"] = Precision("block, smooth q", "fp8", "fp8", "block", smooth_k=True, smooth_q=True)
EPS = torch.finfo(torch.float32).eps


def tensors(
    layout: TokenLayout, batch: int = 1, heads: int = 1, dim: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B,S,H,D] in three memory orders, k and v with means, one block of k and one channel of v all zeros."""
    q = torch.randn(batch, layout.tokens, heads, 2 * dim + 1, dtype=torch.float32).to(dtype)[..., 1 : 2 * dim : 2]
    k = (torch.randn(batch, heads, layout.tokens, dim) + 0.7).to(dtype).transpose(1, 2)
    v = (torch.randn(batch, layout.tokens, heads, dim) + 0.3).to(dtype)
    k[:, : layout.block_sizes[0]] = 0
    v[..., 3] = 0
    return q, k, v


def assert_same_values(ours: torch.Tensor, theirs: torch.Tensor, exact: bool) -> None:
    """Equal; or where means differ by float32 rounding, off by a unit at ties of the 8-bit grid.

    |x| < 8, so means are off by at most 100 roundings of 8, below 1e-4, and 8-bit steps are 2 to 448 a scale: values
    are within 1e-4 of a tie with a probability around 1e-4 / (8 / 127) < 1/500. Rounding twice moves one value in 256.
    """
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    off = (units(ours) - units(theirs)).abs()
    twice = rounds_twice(ours.dtype)
    assert off.max() <= (0 if exact and not twice else 1)
    assert off.count_nonzero() <= off.numel() / (64 if twice else 500)


def assert_same(ours: Prepared, theirs: Prepared, precision: Precision, layout: TokenLayout) -> None:
    assert_same_values(ours.q, theirs.q, not precision.smooth_q)
    tokens = layout.tokens
    assert_same_values(ours.k[:, :tokens], theirs.k[:, :tokens], not precision.smooth_k)
    if ours.k.shape[1] > tokens:
        assert_same_values(ours.k[:, tokens:], theirs.k[:, tokens:], False)
    assert ours.k.shape == theirs.k.shape
    if precision.pv == "fp8":
        first = int(aligned_offsets(layout)[-2])
        assert_same_values(ours.v[..., :first], theirs.v[..., :first], not precision.smooth_v)
        assert_same_values(ours.v[..., first:], theirs.v[..., first:], False)
        assert ours.v.is_contiguous()
    else:
        torch.testing.assert_close(ours.v, theirs.v, atol=1e-5, rtol=torch.finfo(ours.v.dtype).eps)
    for field in fields(Prepared)[3:]:
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            # sums of D products of block means for the bias, sums over the sequence for means and scales
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5, msg=lambda text, n=field.name: f"{n}: {text}")
    if not precision.smooth_q:
        assert torch.equal(ours.q_scale, theirs.q_scale)
    if not precision.smooth_k:
        assert torch.equal(ours.k_scale[..., :tokens], theirs.k_scale[..., :tokens])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write holds NaN, or -128 in int8."""
    stock = torch.empty

    def empty(*shape: object, **options: object) -> torch.Tensor:
        made = stock(*shape, **options)
        if made.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).fill_(0x7F)
        elif made.device.type != "meta":
            made.fill_(torch.nan if made.dtype.is_floating_point else -128)
        return made

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(
    "precision",
    [pytest.param(p, marks=[pytest.mark.representative] * (name == "smooth all")) for name, p in RECIPES.items()],
    ids=lambda p: p.name,
)
def test_equals_the_torch_version(precision: Precision, tail: bool) -> None:
    layout = make_layout(**RAGGED, text=13)
    q, k, v = tensors(layout, dim=32)
    assert_same(
        prepare(q, k, v, layout, precision, tail=tail),
        prepare_in_torch(q, k, v, layout, precision, tail=tail),
        precision,
        layout,
    )


@pytest.mark.parametrize("precision", [RECIPES["int8-fp8"], RECIPES["fp8-tile"]], ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [pytest.param(96, torch.bfloat16, marks=pytest.mark.representative), (128, torch.float16), (64, torch.float32)],
)
def test_batches_heads_and_dtypes(precision: Precision, dim: int, dtype: torch.dtype) -> None:
    layout = make_layout((2, 7, 4), (2, 4, 4))
    q, k, v = tensors(layout, batch=2, heads=2, dim=dim, dtype=dtype)
    assert_same(
        prepare(q, k, v, layout, precision, tail=True),
        prepare_in_torch(q, k, v, layout, precision, tail=True),
        precision,
        layout,
    )


LONG = {"grid": (5, 6, 7), "tile": (5, 6, 7)}  # one block of 210 rows
MANY = {"grid": (9, 5, 3), "tile": (1, 1, 1), "text": 1}  # 136 blocks of a token: their means take two scales


@pytest.mark.parametrize(
    ("shape", "name"), [(LONG, "int8"), (LONG, "int8-fp8"), (LONG, "fp8-tile"), (MANY, "plain")], ids=str
)
def test_long_blocks_and_many_means(shape: dict, name: str) -> None:
    layout, precision = make_layout(**shape), RECIPES[name]
    q, k, v = tensors(layout, dim=16)
    assert_same(
        prepare(q, k, v, layout, precision, tail=True),
        prepare_in_torch(q, k, v, layout, precision, tail=True),
        precision,
        layout,
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("granularity", ["block", "rows32"])
def test_ties_round_as_the_oracle_does(dtype: torch.dtype, granularity: str) -> None:
    """Values on and beside the ties of both grids, with the largest one that makes the scale 1."""
    layout = make_layout((1, 16, 16), (1, 8, 8))
    largest = float(torch.nextafter(torch.tensor(127.0), torch.tensor(0.0))) if dtype == torch.int8 else 448.0
    x = torch.arange(layout.tokens * 32).reshape(1, layout.tokens, 1, 32) % 509 / 4 - 63.5
    x[..., 1::2] *= 1 - 2e-6  # just below a tie
    x[..., 0] = largest
    ones = Precision("ties", "int8" if dtype == torch.int8 else "fp8", "native", granularity)
    theirs = prepare_in_torch(x, x, x, layout, ones, tail=False)
    out, scale = torch.empty(x.shape, dtype=dtype), torch.empty(1, 1, layout.tokens)
    round_rows(x, block_offsets(layout, x.device), out, scale, granularity)
    assert torch.equal(units(out), units(theirs.q)) and torch.equal(scale, theirs.q_scale)
    assert (scale == 1).all()


@pytest.mark.representative
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_appended_means(dtype: torch.dtype) -> None:
    layout = make_layout(**RAGGED, text=13)
    _, k, _ = tensors(layout, batch=2, heads=3, dim=20, dtype=dtype)
    ours, theirs = append_means(k, layout), append_in_torch(k, layout)
    assert torch.equal(ours[:, : layout.tokens], k)
    # two float32 sums of up to 32 values below 8, then one rounding each
    torch.testing.assert_close(ours, theirs, atol=32 * 8 * EPS, rtol=torch.finfo(dtype).eps)
    assert all(stride * dtype.itemsize % 16 == 0 for stride in ours.stride()[:-1])


def test_rows_start_where_a_descriptor_can_address_them() -> None:
    made = room((2, 5, 3, 20), torch.int8, torch.device("cpu"))
    assert made.shape == (2, 5, 3, 20) and made.stride() == (480, 96, 32, 1)


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """``x`` [1,S,1,D] with rows 2^26 elements apart: from row 32 on offsets do not fit into 32 bits. Only pages with
    rows take memory."""
    wide = torch.empty_strided(x.shape, (x.shape[1] << 26, 1 << 26, x.shape[3], 1), dtype=x.dtype)
    return wide.copy_(x)


def test_rows_beyond_31_bits() -> None:
    layout = make_layout((2, 5, 4), (2, 5, 4))
    x = torch.randn(1, layout.tokens, 1, 16, dtype=torch.bfloat16)
    near, far = (prepare(y, y, y, layout, RECIPES["int8-fp8"], tail=True) for y in (x, far_apart(x)))
    assert torch.equal(near.q, far.q) and torch.equal(near.k, far.k)
    assert torch.equal(near.v.view(torch.uint8), far.v.view(torch.uint8))
    out = far_apart(torch.zeros_like(near.q))
    round_rows(x, block_offsets(layout, x.device), out, torch.empty(1, 1, layout.tokens), "rows32")
    assert torch.equal(near.q, out)


def test_what_no_kernel_computes_is_refused() -> None:
    x = torch.randn(1, 12, 1, 32)
    layout = make_layout((1, 3, 4), (1, 3, 4))
    with pytest.raises(KernelError, match="no kernel computes precision 'nvfp4'; use kernel 'emulated'"):
        prepare(x, x, x, layout, PRECISIONS["nvfp4"], tail=False)
