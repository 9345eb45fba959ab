"""Partial blocks on the interpreter: rules over tokens in the forward kernel, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import assert_as_good_as_eager, eager, make_layout, random_qkv
from vidaccel.blockmask import BlockMask
from vidaccel.kernels import reference
from vidaccel.kernels.contract import Skips
from vidaccel.kernels.triton import launch as launch_module
from vidaccel.kernels.triton.configs import Config
from vidaccel.kernels.triton.launch import launch
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Neighborhood
from vidaccel.types import PRECISIONS, Precision

RAGGED = {"grid": (3, 5, 6), "tile": (2, 4, 4)}
WINDOWS = [
    Neighborhood(window=(2, 3, 3), exact=True),
    Neighborhood(window=(3, 3, 4), stride=(2, 2, 3), exact=True),
    Neighborhood(window=(3, 2, 3), dilation=(1, 2, 2), exact=True),
]


def stacked(layout: TokenLayout, heads: int) -> BlockMask:
    masks = [pattern.mask(layout) for pattern in WINDOWS[: heads - 1]]
    return BlockMask.stack([*masks, BlockMask.full(layout)], layout)


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    result = reference.block_sparse_attention(
        q, k, v, layout, mask, return_lse=True, out_dtype=torch.float64, **options
    )
    assert isinstance(result, tuple)
    return result


@pytest.mark.representative
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("text", [{"text": 9}, {"text": 9, "text_first": True}], ids=["after", "before"])
def test_a_rule_for_each_head(text: dict[str, int], tail: bool) -> None:
    layout = make_layout(**RAGGED, **text)
    mask = stacked(layout, 3)
    tensors = random_qkv(layout, batch=2 if tail else 1, heads=3, dim=16)
    out, lse = launch(*tensors, layout, mask, tail=tail, return_lse=True)
    exact, exact_lse = oracle(*tensors, layout, mask, tail=tail)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", WINDOWS, ids=["neighborhood", "strided", "dilated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rule_for_all_heads(pattern: Neighborhood, dtype: torch.dtype) -> None:
    layout = make_layout(**RAGGED)
    tensors = random_qkv(layout, dim=32, dtype=dtype)
    mask = pattern.mask(layout)
    exact, _ = oracle(*tensors, layout, mask)
    assert_as_good_as_eager(launch(*tensors, layout, mask), eager(*tensors, layout, mask), exact)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16), (64, 64)])
def test_tile_sizes_are_free(block_m: int, block_n: int) -> None:
    """Pieces of a partial block find their own tokens in the rule."""
    layout = make_layout((3, 6, 9), (2, 4, 8))
    tensors = random_qkv(layout, heads=1, dim=16)
    mask = WINDOWS[0].mask(layout)
    out = launch(*tensors, layout, mask, tail=True, config=Config(block_m, block_n, 4, 1))
    torch.testing.assert_close(out.double(), oracle(*tensors, layout, mask, tail=True)[0], atol=1e-5, rtol=1e-5)


def test_long_words() -> None:
    layout = make_layout((1, 2, 50), (1, 2, 32))
    mask = Neighborhood(window=(1, 2, 7), exact=True).mask(layout)
    tensors = random_qkv(layout, heads=1, dim=16)
    out = launch(*tensors, layout, mask)
    torch.testing.assert_close(out.double(), oracle(*tensors, layout, mask)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.representative
@pytest.mark.parametrize("name", ["int8-fp8", "fp8-tile"])
def test_8_bit_precisions(name: str) -> None:
    """The scores are exact sums of the oracle's integers or fp8 numbers, so the LSE is that of float32."""
    layout = make_layout(**RAGGED, text=5)
    mask = stacked(layout, 2)
    tensors = random_qkv(layout, dim=32)
    out, lse = launch(*tensors, layout, mask, precision=PRECISIONS[name], return_lse=True)
    rounded, rounded_lse = oracle(*tensors, layout, mask, precision=PRECISIONS[name])
    exact, _ = oracle(*tensors, layout, mask)
    torch.testing.assert_close(lse.double(), rounded_lse, atol=1e-5, rtol=1e-5)
    error = (out.double() - exact).norm() / exact.norm()
    assert error <= 1.2 * (rounded - exact).norm() / exact.norm()


def test_int8_by_groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q smoothing runs a few heads at a time, each with its own rule."""
    precision = Precision("smooth", "int8", "native", "rows32", smooth_k=True, smooth_q=True)
    layout = make_layout(**RAGGED)
    mask = stacked(layout, 3)
    tensors = random_qkv(layout, heads=3, dim=32)
    monkeypatch.setattr(launch_module, "_MAX_BIAS", 1)
    out = launch(*tensors, layout, mask, precision=precision)
    expected, _ = oracle(*tensors, layout, mask, precision=precision)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.representative
@pytest.mark.parametrize("threshold", [-0.3, -2.0])
def test_skipping(threshold: float) -> None:
    """Rows of which nothing was kept so far neither hold a piece back nor become NaN."""
    layout = make_layout((2, 8, 8), (1, 4, 4))
    q, k, v = random_qkv(layout, batch=2, heads=2, dim=32)
    q = 2 * q
    mask = BlockMask.stack([WINDOWS[1].mask(layout), WINDOWS[2].mask(layout)], layout)
    ours, theirs = Skips.of(threshold, q), Skips.of(threshold, q)
    out, lse = launch(q, k, v, layout, mask, return_lse=True, skips=ours)
    exact, exact_lse = oracle(q, k, v, layout, mask, skips=theirs)
    assert torch.equal(ours.skipped, theirs.skipped)
    if threshold == -0.3:
        assert ours.skipped.any()
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
