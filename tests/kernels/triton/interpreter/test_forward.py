"""The forward kernel on the interpreter, against the float64 oracle and beside eager attention in the same dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.kernels.helpers import assert_as_good_as_eager, eager, make_layout, random_mask, random_qkv
from vidaccel.blockmask import BlockMask
from vidaccel.errors import KernelError, LayoutError
from vidaccel.kernels import reference, torch_sparse
from vidaccel.kernels.contract import Skips
from vidaccel.kernels.triton.configs import Config
from vidaccel.kernels.triton.launch import launch
from vidaccel.layout import TokenLayout
from vidaccel.patterns import (
    FirstFrameSink,
    Neighborhood,
    Pattern,
    Radial,
    SlidingTile,
    SpatialBand,
    TemporalBand,
)
from vidaccel.types import PRECISIONS

NATIVE = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = {"grid": (3, 7, 6), "tile": (2, 4, 4)}


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE in float64."""
    result = reference.block_sparse_attention(
        q, k, v, layout, mask, return_lse=True, out_dtype=torch.float64, **options
    )
    assert isinstance(result, tuple)
    return result


def check(
    layout: TokenLayout,
    mask: BlockMask,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    config: Config | None = None,
    tail: bool = False,
) -> None:
    """Output as good as eager attention's; LSE within float32 rounding of scores that the dtype's rounding moved."""
    q, k, v = tensors
    out, lse = launch(q, k, v, layout, mask, tail=tail, return_lse=True, config=config)
    exact, exact_lse = oracle(q, k, v, layout, mask, tail=tail)
    assert_as_good_as_eager(out, eager(q, k, v, layout, mask, tail), exact)
    # Block means are rounded to the inputs' dtype: a logit moves by at most |q| |kmean| eps/2 / sqrt(D).
    means = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) / math.sqrt(q.shape[-1])
    moved = means * torch.finfo(q.dtype).eps / 2 if tail else 0.0
    assert (lse.double() - exact_lse).abs().max() <= moved + 64 * torch.finfo(torch.float32).eps * max(
        1.0, float(exact_lse.abs().max())
    )


@pytest.mark.representative
@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("tail", [False, True])
def test_every_dtype(dtype: torch.dtype, tail: bool) -> None:
    layout = make_layout(**RAGGED)
    check(layout, random_mask(layout, 1, [0.4]), random_qkv(layout, heads=1, dim=64, dtype=dtype), tail=tail)


@pytest.mark.parametrize("dim", [20, 64, 96, 128])
def test_every_head_dim(dim: int) -> None:
    layout = make_layout((2, 5, 4), (1, 4, 4))
    check(layout, random_mask(layout, 1, [0.6]), random_qkv(layout, heads=1, dim=dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("tail", [False, True])
def test_heads_of_different_density_batch_and_text(tail: bool) -> None:
    layout = make_layout(**RAGGED, text=13)
    mask = random_mask(layout, 2, [0.1, 0.5, 1.0])
    check(layout, mask, random_qkv(layout, batch=2, heads=3, dim=32), tail=tail)


def test_long_text_and_twelve_heads() -> None:
    """Text of several pieces, the last of them one token; every program finds its own head."""
    layout = make_layout((1, 4, 4), (1, 4, 4), text=513)
    check(layout, random_mask(layout, 1, [0.5]), random_qkv(layout, heads=1, dim=64, dtype=torch.bfloat16), tail=True)
    layout = make_layout((1, 5, 4), (1, 4, 4))
    densities = [0.0, 0.5, 1.0] * 4
    check(layout, random_mask(layout, 1, densities), random_qkv(layout, heads=12, dim=32, dtype=torch.bfloat16))


@pytest.mark.representative
def test_one_mask_for_all_heads() -> None:
    layout = make_layout(**RAGGED)
    check(layout, random_mask(layout, 1, [0.3]), random_qkv(layout, batch=2, heads=2, dim=32), tail=True)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16), (16, 16), (64, 64)])
def test_tile_sizes_are_free(block_m: int, block_n: int) -> None:
    """Blocks longer than a tile are cut into pieces; shorter ones are masked."""
    layout = make_layout((2, 6, 6), (2, 4, 4))
    tensors = random_qkv(layout, heads=1, dim=32)
    check(layout, random_mask(layout, 1, [0.5]), tensors, Config(block_m, block_n, 4, 2), tail=True)


@pytest.mark.representative
def test_strided_and_unaligned_inputs() -> None:
    """q, k, v as slices of one fused projection, starting at an odd element."""
    layout = make_layout((2, 4, 4), (1, 4, 4))
    fused = torch.randn(1, layout.tokens, 2, 3 * 20 + 1, dtype=torch.bfloat16)
    q, k, v = (fused[..., 1 + 20 * i : 21 + 20 * i] for i in range(3))
    check(layout, random_mask(layout, 1, [0.5, 0.5]), (q, k, v))


def test_a_full_mask_is_dense_attention() -> None:
    layout = make_layout(**RAGGED)
    q, k, v = random_qkv(layout, heads=1, dim=64, dtype=torch.bfloat16)
    out = launch(q, k, v, layout, BlockMask.full(layout), tail=True)  # nothing skipped: the tail is empty
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    assert_as_good_as_eager(out, eager(q, k, v, layout, BlockMask.full(layout)), dense.transpose(1, 2))


PATTERNS = [
    SlidingTile(window=(1.0, 0.5, 0.5)),
    Neighborhood(window=(0.6, 0.5, 0.5), stride="tile"),
    Radial(decay=0.5, floor=8),
    SpatialBand(width=1.0, unit="frames"),
    TemporalBand(width=1.0, unit="frames"),
    FirstFrameSink(frames=1),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_static_patterns_equal_the_gather_path(pattern: Pattern) -> None:
    """Both are correct to float32 rounding, so they differ by twice that at most."""
    layout = make_layout((4, 4, 8), (1, 4, 4))
    mask = BlockMask.from_dense(pattern.blocks(layout))
    q, k, v = random_qkv(layout, heads=1, dim=16)
    ours, other = (f(q, k, v, layout, mask, tail=True) for f in (launch, torch_sparse.block_sparse_attention))
    torch.testing.assert_close(ours, other, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("threshold", [-0.3, -2.0, -math.inf])
def test_skipping_is_what_the_oracle_says(threshold: float) -> None:
    layout = make_layout((2, 8, 8), (1, 4, 4))
    q, k, v = random_qkv(layout, batch=2, heads=2, dim=32)
    mask = random_mask(layout, 2, [0.6, 1.0])
    limits = torch.tensor([threshold, 4 * threshold])
    ours, theirs = Skips.of(limits, q), Skips.of(limits, q)
    out, lse = launch(q, k, v, layout, mask, return_lse=True, skips=ours)
    exact, exact_lse = oracle(q, k, v, layout, mask, skips=theirs)
    assert torch.equal(ours.skipped, theirs.skipped)
    if math.isinf(threshold):
        assert not ours.skipped.any()
    if threshold == -0.3:
        assert ours.skipped.any()
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.representative
def test_long_blocks_are_skipped_piece_by_piece() -> None:
    """Also with counts that are a view of something larger, and by groups of heads."""
    layout = make_layout((3, 8, 8), (2, 4, 8))  # blocks of 64 and 32 tokens
    q, k, v = random_qkv(layout, batch=2, heads=2, dim=32)
    q = 6 * q  # peaked, so that whole pieces are far from every row's maximum
    mask = random_mask(layout, 2, [0.6, 1.0])
    config = Config(32, 16, 4, 1)
    theirs = replace(Skips.of(-0.3, q), pieces=(config.block_m, config.block_n))
    counts = torch.zeros(2, 5, dtype=torch.int64)
    out = launch(q, k, v, layout, mask, skips=Skips(theirs.threshold, counts[:, 1:3]), config=config)
    exact, _ = oracle(q, k, v, layout, mask, skips=theirs)
    assert theirs.skipped.any() and torch.equal(counts[:, 1:3], theirs.skipped) and not counts[:, 3:].any()
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dim", "precision"), [(8, "native"), (16, "int8")])
def test_few_channels(dim: int, precision: str) -> None:
    layout = make_layout()
    q, k, v = random_qkv(layout, dim=dim)
    mask = random_mask(layout, 1, [0.5])
    out = launch(q, k, v, layout, mask, precision=PRECISIONS[precision])
    expected, _ = oracle(q, k, v, layout, mask, precision=PRECISIONS[precision])
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    layout = make_layout()
    q, k, v = random_qkv(layout)
    with pytest.raises(KernelError, match="scale is -1.0; .* positive"):
        launch(q, k, v, layout, BlockMask.full(layout), scale=-1.0)


def test_a_mask_of_another_layout_is_refused() -> None:
    layout = make_layout()
    q, k, v = random_qkv(layout)
    with pytest.raises(LayoutError, match="build the mask from this layout"):
        launch(q, k, v, layout, BlockMask.full(make_layout((3, 3, 3), (1, 1, 1))))
