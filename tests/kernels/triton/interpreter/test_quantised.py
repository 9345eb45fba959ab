"""The 8-bit precisions of the kernel on the interpreter, against the oracle that rounds with the same scales."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.helpers import make_layout, random_mask, random_qkv
from vidaccel.blockmask import BlockMask
from vidaccel.kernels import reference
from vidaccel.kernels.triton import launch as launch_module
from vidaccel.kernels.triton.configs import Config
from vidaccel.kernels.triton.launch import launch
from vidaccel.layout import TokenLayout
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, Precision

RAGGED = {"grid": (3, 7, 6), "tile": (2, 4, 4)}
QUANTISED = {name: precision for name, precision in KERNEL_PRECISIONS.items() if precision.quantised}
# every option at once that the named recipes do not combine
QUANTISED["smooth all"] = Precision("smooth all", "int8", "fp8", "rows32", smooth_k=True, smooth_q=True, smooth_v=True)
QUANTISED["tensor"] = Precision("tensor", "fp8", "fp8", "tensor", smooth_k=True, smooth_v=True)


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b).norm() / b.norm())


def oracles(
    tensors: Tensors, precision: Precision, layout: TokenLayout, mask: BlockMask, tail: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """(output, LSE) of the oracle in this precision, and exactly."""
    options = {"tail": tail, "return_lse": True, "out_dtype": torch.float64}
    rounded = reference.block_sparse_attention(*tensors, layout, mask, precision=precision, **options)
    exact = reference.block_sparse_attention(*tensors, layout, mask, **options)
    return rounded, exact


@pytest.mark.representative
@pytest.mark.parametrize("precision", QUANTISED.values(), ids=lambda p: p.name)
def test_equals_the_oracle_with_the_same_roundings(precision: Precision) -> None:
    layout = make_layout(**RAGGED, text=5)
    batch = 2 if precision.name == "smooth all" else 1
    mask = random_mask(layout, batch, [0.4, 0.8])
    tensors = random_qkv(layout, batch=batch, dim=64)
    out, lse = launch(*tensors, layout, mask, precision=precision, return_lse=True)
    (rounded, rounded_lse), (exact, _) = oracles(tensors, precision, layout, mask, False)
    # the scores are exact sums of the same integers or fp8 numbers, so the LSE differs by float32 rounding only
    torch.testing.assert_close(lse.double(), rounded_lse, atol=1e-5, rtol=1e-5)
    if precision.pv == "native":
        torch.testing.assert_close(out.double(), rounded, atol=1e-5, rtol=1e-5)
    else:
        # P is rounded to 4 significant bits, here relative to the running maximum and there to the final one: two
        # roundings of equal size, so they are no further from each other than sqrt(2) times from the exact result
        assert distance(out, rounded) <= 1.42 * distance(rounded, exact)
        assert distance(out, exact) <= 1.2 * distance(rounded, exact)


@pytest.mark.parametrize("precision", QUANTISED.values(), ids=lambda p: p.name)
def test_tail_costs_no_accuracy(precision: Precision) -> None:
    """The oracle's tail is not rounded; the kernel's is, like everything else, so it is at most as bad as that."""
    layout = make_layout(**RAGGED)
    mask = random_mask(layout, 1, [0.3, 0.6])
    tensors = random_qkv(layout, dim=64)
    out = launch(*tensors, layout, mask, precision=precision, tail=True)
    (rounded, _), (exact, _) = oracles(tensors, precision, layout, mask, True)
    (dropped, _), (kept_only, _) = oracles(tensors, precision, layout, mask, False)
    assert distance(out, exact) <= distance(rounded, exact) + distance(dropped, kept_only)


@pytest.mark.parametrize("name", ["int8-fp8", "fp8-tile"])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 64), (64, 32)])
def test_pieces_keep_their_scales(name: str, block_m: int, block_n: int) -> None:
    """Blocks of 64 tokens cut into pieces: scales belong to blocks and groups of 32 rows, not to pieces."""
    layout = make_layout((5, 4, 5), (4, 4, 4))
    mask = random_mask(layout, 1, [0.5, 1.0])
    tensors = random_qkv(layout, dim=32)
    config = Config(block_m, block_n, 4, 2)
    out, lse = launch(*tensors, layout, mask, precision=PRECISIONS[name], return_lse=True, config=config)
    (rounded, rounded_lse), (exact, _) = oracles(tensors, PRECISIONS[name], layout, mask, False)
    torch.testing.assert_close(lse.double(), rounded_lse, atol=1e-5, rtol=1e-5)
    assert distance(out, exact) <= 1.2 * distance(rounded, exact)


@pytest.mark.parametrize("precision", KERNEL_PRECISIONS.values(), ids=lambda p: p.name)
def test_bf16_inputs_with_head_dim_96(precision: Precision) -> None:
    layout = make_layout(**RAGGED)
    q, k, v = random_qkv(layout, heads=1, dim=96, dtype=torch.bfloat16)
    mask = random_mask(layout, 1, [0.5])
    out = launch(q, k, v, layout, mask, precision=precision, tail=True)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    exact = reference.block_sparse_attention(q, k, v, layout, mask, tail=True, out_dtype=torch.float64)
    rounded = reference.block_sparse_attention(q, k, v, layout, mask, tail=True, precision=precision)
    assert distance(out, exact) <= 1.5 * distance(rounded, exact)


@pytest.mark.parametrize("precision", [QUANTISED["smooth all"]], ids=lambda p: p.name)
def test_q_smoothing_by_groups_of_heads(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    """Its term takes memory, so heads may run one after the other; that changes nothing."""
    layout = make_layout((2, 4, 4), (1, 4, 4))
    q, k, v = random_qkv(layout, heads=3, dim=32)
    mask = random_mask(layout, 1, [0.5, 1.0, 0.5])
    options = {"precision": precision, "tail": True, "return_lse": True}
    whole = launch(q, k, v, layout, mask, **options)
    monkeypatch.setattr(launch_module, "_MAX_BIAS", 1)
    for one, other in zip(whole, launch(q, k, v, layout, mask, **options), strict=True):
        assert torch.equal(one, other)


def test_16_bit_values_may_be_strided_and_unaligned() -> None:
    """With int8 scores and native PV the kernel reads V itself, here a slice of one fused projection."""
    layout = make_layout((2, 4, 4), (1, 4, 4))
    fused = torch.randn(1, layout.tokens, 2, 3 * 32 + 1, dtype=torch.bfloat16)
    q, k, v = (fused[..., 1 + 32 * i : 33 + 32 * i] for i in range(3))
    mask = random_mask(layout, 1, [0.5, 0.5])
    out = launch(q, k, v, layout, mask, precision=PRECISIONS["int8"])
    same = launch(*(x.contiguous() for x in (q, k, v)), layout, mask, precision=PRECISIONS["int8"])
    assert torch.equal(out, same)
