"""Norm, rotation and gather on the interpreter, against plain torch in float64, rounded once."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.helpers import make_layout
from tests.kernels.triton.rounding import rounds_twice, units
from vidaccel.errors import KernelError
from vidaccel.kernels.quantise import quantise, row_groups
from vidaccel.kernels.triton.rope import gather, rotate_and_gather, rotate_and_quantise, rotate_with_means
from vidaccel.layout import TokenLayout

EPS = 1e-6


def plain(
    x: torch.Tensor,
    order: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    style: str = "interleaved",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in float64, not rounded; ``order`` int64 [S'], tables in the order of the result."""
    x = x[:, order.clamp(min=0)].double()
    if weight is not None:
        together = x if len(weight) == x.shape[-1] else x.flatten(2)
        together = together * (together.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        x = together.view_as(x)
    if cos is not None and sin is not None:
        if style == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            turned = torch.stack([-b, a], dim=-1).flatten(-2)
        else:
            a, b = x.chunk(2, dim=-1)
            turned = torch.cat([-b, a], dim=-1)
        x = x * cos.double()[:, None] + turned * sin.double()[:, None]
    return x * (order >= 0)[:, None, None]


def close(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to ``dtype``, and a few in float32 on elements that a rotation may make small."""
    assert out.dtype == dtype and out.shape == exact.shape and out.is_contiguous()
    single = 8 * torch.finfo(torch.float32).eps * max(1.0, float(exact.abs().max()))
    unit = torch.finfo(dtype).eps / 2 * 1.01 if dtype != torch.float32 else 0.0
    assert ((out.double() - exact).abs() <= single + unit * exact.abs() + torch.finfo(dtype).tiny).all()


def rotations(length: int, dim: int, repeat: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, dim]; without ``repeat`` each channel has an angle of its own."""
    angle = torch.randn(length, dim // 2 if repeat else dim) * 3
    angle = angle.repeat_interleave(2, dim=-1) if repeat else angle
    return angle.cos(), angle.sin()


def sample(layout: TokenLayout, batch: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """x [B,S,H,D] as a part of a fused projection that begins at an odd element."""
    return torch.randn(batch, layout.tokens, heads, 2 * dim + 1).to(dtype)[..., dim + 1 :]


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["none", "head", "row"])
@pytest.mark.parametrize(
    ("batch", "heads", "dim", "dtype"),
    [(2, 3, 64, torch.bfloat16), (1, 1, 96, torch.float32), (1, 2, 128, torch.float16), (1, 2, 20, torch.float32)],
)
def test_rotate_and_gather(style: str, norm: str, batch: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    layout = make_layout((3, 5, 6), (2, 4, 4), text=13)
    x = sample(layout, batch, heads, dim, dtype)
    cos, sin = rotations(layout.tokens, dim, repeat=False)
    weight = {"none": None, "head": torch.randn(dim), "row": torch.randn(heads * dim)}[norm]
    out = rotate_and_gather(x, layout.order.int(), cos, sin, style=style, norm_weight=weight, eps=EPS)
    close(out, plain(x, layout.order, cos, sin, style, weight), dtype)


@pytest.mark.representative
def test_wan_layout_of_tables_and_norm() -> None:
    """Wan's own sequence: norm over all heads, interleaved rotation by raster tables, then the layout's order."""
    layout = make_layout((3, 7, 5), (2, 4, 4))
    x = sample(layout, 1, 3, 32, torch.float32)
    cos, sin = rotations(layout.tokens, 32)
    weight = torch.randn(96)
    normed = torch.nn.functional.rms_norm(x.flatten(2), (96,), weight, EPS).view_as(x)
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
    raster = torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)
    out = rotate_and_gather(x, layout.order.int(), cos, sin, tables="source", norm_weight=weight, eps=EPS)
    torch.testing.assert_close(out, layout.tile(raster), atol=1e-5, rtol=1e-5)
    # tables in the result's order are the same rotation
    tiled = (layout.tile(t, 0) for t in (cos, sin))
    assert torch.equal(out, rotate_and_gather(x, layout.order.int(), *tiled, norm_weight=weight, eps=EPS))


@pytest.mark.representative
@pytest.mark.parametrize("shape", ["S", "BS", "BHS"])
@pytest.mark.parametrize("dim", [5, 64])
def test_gather_with_holes(shape: str, dim: int) -> None:
    """Clustered orders: any length, rows twice, and -1 for rows of zeros even where x is not finite."""
    layout = make_layout((2, 5, 5), (1, 4, 4))
    x = sample(layout, 2, 3, dim, torch.bfloat16)
    x[:, 0] = torch.nan
    wide = {"S": (), "BS": (2,), "BHS": (2, 3)}[shape]
    order = torch.randint(-1, layout.tokens, (*wide, 37), dtype=torch.int32)
    order[..., ::5] = -1
    order[order == 0] = -1
    out = gather(x, order)
    every = order.expand(37) if not wide else order.unsqueeze(1) if shape == "BS" else order
    index = every.expand(2, 3, 37).transpose(1, 2).long()
    expected = torch.take_along_dim(x, index.clamp(min=0).unsqueeze(-1), dim=1)
    assert torch.equal(out, torch.where(index.unsqueeze(-1) < 0, 0, expected))


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_order_per_head_with_norm_and_source_tables(style: str) -> None:
    layout = make_layout((2, 5, 5), (1, 4, 4))
    x = sample(layout, 1, 2, 32, torch.float32)
    cos, sin = rotations(layout.tokens, 32)
    weight = torch.randn(32)
    order = torch.stack([torch.randperm(layout.tokens), torch.randperm(layout.tokens)]).int()[None]
    order[0, 1, 3] = -1
    options = {"style": style, "tables": "source", "norm_weight": weight, "eps": EPS}
    out = rotate_and_gather(x, order, cos, sin, **options)
    for head in range(2):
        rows = order[0, head].long()
        turned = plain(x[:, :, head : head + 1], rows, cos[rows.clamp(min=0)], sin[rows.clamp(min=0)], style, weight)
        close(out[:, :, head : head + 1].contiguous(), turned, torch.float32)


def test_without_an_order_rows_stay() -> None:
    x = torch.randn(1, 19, 2, 32)
    cos, sin = rotations(19, 32)
    close(rotate_and_gather(x, None, cos, sin), plain(x, torch.arange(19), cos, sin), torch.float32)
    assert rotate_and_gather(x, torch.empty(0, dtype=torch.int32), None, None).shape == (1, 0, 2, 32)


@pytest.mark.representative
@pytest.mark.parametrize("norm", ["head", "row"])
def test_means_from_the_same_pass(norm: str) -> None:
    layout = make_layout((3, 5, 6), (2, 4, 4), text=5)
    x = sample(layout, 2, 2, 32, torch.bfloat16)
    cos, sin = rotations(layout.tokens, 32)
    weight = torch.randn(32 if norm == "head" else 64)
    out, means = rotate_with_means(x, layout, cos, sin, norm_weight=weight, eps=EPS)
    exact = plain(x, layout.order, cos, sin, "interleaved", weight)
    close(out, exact, torch.bfloat16)
    ends = itertools.pairwise(layout.block_offsets.tolist())
    expected = torch.stack([exact[:, a:b].mean(1) for a, b in ends], dim=2)
    assert means.dtype == torch.float32 and means.shape == expected.shape
    # sums of up to 32 float32 numbers; far below what bf16 rounding before the sum would cost
    assert (means - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * float(exact.abs().max())


@pytest.mark.representative
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("number_format", "granularity", "tile", "style"),
    [
        ("int8", "rows32", (2, 5, 4), "interleaved"),
        ("fp8", "block", (2, 4, 4), "half"),
        ("int8", "block", (3, 5, 6), "interleaved"),
    ],
)
def test_rounded_to_eight_bits(
    number_format: str, granularity: str, tile: tuple[int, int, int], style: str, norm: bool
) -> None:
    """The oracle's scales and roundings of the rotation's float32 result.

    Without a norm both come from the same float32 numbers. With one, kernels for more rows at once are compiled with
    other layouts and add a row's squares in another order.
    """
    layout = make_layout((3, 5, 6), tile, text=5)
    x = sample(layout, 1, 2, 20, torch.float32)
    cos, sin = rotations(layout.tokens, 10, repeat=False)  # an angle for each of ten pairs
    options = {"style": style, "norm_weight": torch.randn(40) if norm else None, "eps": EPS}
    turned, means = rotate_with_means(x, layout, cos, sin, **options)
    values, scale, rounded_means = rotate_and_quantise(x, layout, cos, sin, number_format, granularity, **options)
    expected = quantise(turned.transpose(1, 2), row_groups(layout, granularity), number_format)
    # a sum of 40 squares is off by at most 20 roundings, and its root by half of that; then come four roundings
    eps = torch.finfo(torch.float32).eps if norm else 0.0
    torch.testing.assert_close(scale, expected.scale.squeeze(-1), rtol=24 * eps, atol=0)
    off = (units(values) - units(expected.values.transpose(1, 2).contiguous())).abs()
    twice = rounds_twice(values.dtype)
    assert off.max() <= (1 if norm or twice else 0)
    # of 127 steps one is crossed by less than 127 * 48 eps: one value in a thousand
    assert off.count_nonzero() <= off.numel() / (64 if twice else 1000)
    torch.testing.assert_close(rounded_means, means, atol=1e-5, rtol=1e-5)
    assert values.stride(-2) % 16 == 0


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_tables_of_pairs(style: str) -> None:
    """A column for each pair is the same as its value for both members."""
    layout = make_layout((2, 5, 5), (1, 4, 4))
    x = sample(layout, 1, 2, 20, torch.float32)
    tables = rotations(layout.tokens, 10, repeat=False)
    if style == "interleaved":
        full = [table.repeat_interleave(2, dim=-1) for table in tables]
    else:
        full = [table.repeat(1, 2) for table in tables]
    order = layout.order.int()
    assert torch.equal(
        rotate_and_gather(x, order, *tables, style=style), rotate_and_gather(x, order, *full, style=style)
    )


def test_a_scale_for_long_blocks_is_refused() -> None:
    layout = make_layout((3, 8, 8), (3, 8, 8))
    x = torch.zeros(1, layout.tokens, 1, 16)
    with pytest.raises(KernelError, match="int8 with a scale for block of 192 rows; .* rotate first"):
        rotate_and_quantise(x, layout, None, None, "int8", "block")
    full = torch.zeros(layout.tokens, 16)
    with pytest.raises(KernelError, match=r"at most 64 tokens \(128 with tables of D/2 columns\)"):
        rotate_and_quantise(x, layout, full, full, "int8", "block")
    with pytest.raises(KernelError, match=r"give \[B,192,H,D\]"):
        rotate_and_quantise(x[:, 1:], layout, None, None, "int8", "rows32")


def test_rows_beyond_31_bits() -> None:
    """Rows 2^26 elements apart: from row 32 on offsets do not fit into 32 bits. Only pages with rows take memory."""
    x = torch.randn(1, 40, 1, 16)
    far = torch.empty_strided(x.shape, (40 << 26, 1 << 26, 16, 1)).copy_(x)
    order = torch.arange(39, -1, -1, dtype=torch.int32)
    cos, sin = rotations(40, 16)
    assert torch.equal(rotate_and_gather(x, order, cos, sin), rotate_and_gather(far, order, cos, sin))


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_channels_beyond_31_bits(style: str) -> None:
    """Channels 2^28 elements apart, as where they are the outermost axis: their offsets were taken in 32 bits once."""
    x = torch.randn(1, 20, 1, 16, dtype=torch.bfloat16)
    far = torch.empty_strided(x.shape, (20, 1, 20, 1 << 28), dtype=torch.bfloat16).copy_(x)
    cos, sin = rotations(20, 16)
    near = rotate_and_gather(x, None, cos, sin, style=style)
    assert torch.equal(near, rotate_and_gather(far, None, cos, sin, style=style))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 6, 2, 8)
    table = torch.zeros(6, 8)
    order = torch.arange(6, dtype=torch.int32)
    for arguments, options, message in (
        ((x[0], order, table, table), {}, r"give \[B,S,H,D\]"),
        ((x, order.long(), table, table), {}, "give int32"),
        ((x, order.expand(3, 6), table, table), {}, "give int32"),
        ((x, order, table, None), {}, "give both or neither"),
        ((x, order[:4], table, table), {}, r"\[4,8\]"),
        ((x, order, table, table), {"norm_weight": torch.zeros(4)}, r"give \[8\] .* \[16\]"),
        ((x, order.expand(1, 2, 6), None, None), {"norm_weight": torch.zeros(16)}, "normalise first"),
        ((x, order, table, table), {"style": "neox"}, "valid are interleaved or half"),
    ):
        with pytest.raises(KernelError, match=message):
            rotate_and_gather(*arguments, **options)
