"""The sampled oracle equals the whole one where both fit, and the shapes and masks are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sampled import Sample, sampled_attention, tolerance
from benchmarks.shapes import DENSITIES, SHAPES, make_mask
from tests.kernels.helpers import make_layout, random_mask, random_qkv
from tests.rounding import assert_rounded, rounding
from vidaccel.kernels.reference import block_sparse_attention as oracle
from vidaccel.kernels.torch_sparse import block_sparse_attention as torch_sparse
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, Precision

RAGGED = {"grid": (5, 7, 9), "tile": (2, 4, 4)}


@pytest.mark.parametrize("precision", KERNEL_PRECISIONS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("tail", [False, True])
def test_equals_the_oracle(precision: Precision, tail: bool) -> None:
    layout = make_layout(**RAGGED, text=13)
    mask = random_mask(layout, 1, [0.2, 0.5, 0.9])
    q, k, v = random_qkv(layout, heads=3, dim=64)
    sample = Sample.of(layout.tokens, heads=3, count=50)
    exact = oracle(q, k, v, layout, mask, precision=precision, tail=tail, out_dtype=torch.float64)
    assert isinstance(exact, torch.Tensor)
    got = sampled_attention(q, k, v, layout, mask, sample, precision=precision, tail=tail)
    # float64 sums of the same numbers; the means are made in float32 here
    assert_rounded(got, sample.of_output(exact), rounding(q, k, v).out)
    assert sample.heads == (0, 2) and {0, layout.tokens - 1} <= set(sample.rows.tolist())


def test_tolerance_separates_rounding_from_a_lost_block() -> None:
    """bf16 passes; the same output with one key block left out does not."""
    layout = make_layout((8, 16, 16), (2, 8, 8))
    q, k, v = random_qkv(layout, heads=2, dim=64, dtype=torch.bfloat16)
    v = v - v.mean(1, keepdim=True)
    mask = make_mask("random", layout, 0.5, 2)
    sample = Sample.of(layout.tokens, heads=2, count=64)
    exact = sampled_attention(q, k, v, layout, mask, sample)
    out = torch_sparse(q, k, v, layout, mask)
    assert isinstance(out, torch.Tensor)
    limit = tolerance(PRECISIONS["native"], torch.bfloat16, False)
    assert (sample.of_output(out) - exact).norm() / exact.norm() <= limit
    keep = mask.dense.clone()
    keep[..., 3] = False
    keep |= torch.eye(layout.num_blocks, dtype=torch.bool)
    wrong = torch_sparse(q, k, v, layout, type(mask).from_dense(keep))
    assert isinstance(wrong, torch.Tensor)
    assert (sample.of_output(wrong) - exact).norm() / exact.norm() > limit


def test_smoothed_q_is_refused() -> None:
    layout = make_layout()
    q, k, v = random_qkv(layout)
    odd = Precision("odd", "int8", smooth_q=True)
    with pytest.raises(ValueError, match="is emulated"):
        sampled_attention(
            q, k, v, layout, random_mask(layout, 1, [0.5, 0.5]), Sample.of(layout.tokens, 2), precision=odd
        )


def test_shapes_are_those_of_the_models() -> None:
    lengths = {name: shape.tokens for name, shape in SHAPES.items()}
    assert lengths["wan-480p-1.3b"] == 32_760 and lengths["wan-720p-14b"] == 75_600
    assert lengths["hunyuan"] == 115_200 + 256 and lengths["cogvideox"] == 17_550 + 226
    shape = SHAPES["wan-480p-1.3b"]
    assert shape.operations(0.5) == pytest.approx(2 * 12 * 32_760**2 * 128)
    assert shape.least_bytes() == 4 * 32_760 * 12 * 128 * 2


@pytest.mark.parametrize("density", DENSITIES)
def test_masks_have_the_density_asked_for(density: float) -> None:
    layout = SHAPES["wan-480p-1.3b"].layout()
    assert make_mask("random", layout, density, 2).density(layout) == pytest.approx(density, rel=0.05)
    # windows come in whole tiles, so the next one may be some way off
    assert make_mask("sta", layout, density, 2).density(layout) == pytest.approx(density, rel=0.3)


def test_random_masks_are_fixed_and_differ_by_head() -> None:
    layout = make_layout()
    a, b = (make_mask("random", layout, 0.5, 2) for _ in range(2))
    assert torch.equal(a.dense, b.dense) and not torch.equal(a.dense[0, 0], a.dense[0, 1])
    assert bool(a.dense.diagonal(dim1=-2, dim2=-1).all())
