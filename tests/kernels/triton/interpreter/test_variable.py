"""Blocks of variable size through the forward kernel on the interpreter, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.helpers import assert_as_good_as_eager
from tests.kernels.variables import eager_variable, random_variable
from vidaccel.errors import KernelError
from vidaccel.kernels import variable
from vidaccel.kernels.triton.configs import Config
from vidaccel.kernels.triton.variable import launch
from vidaccel.variablemask import VariableBlockMask

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, VariableBlockMask]


def check(call: Call, *, tail: bool, config: Config | None = None) -> None:
    """Output as good as eager attention's; LSE within float32 rounding of scores that the dtype's rounding moved."""
    q, k, v, mask = call
    out, lse = launch(q, k, v, mask, tail=tail, return_lse=True, config=config)
    exact, exact_lse = variable.oracle(q, k, v, mask, tail=tail, return_lse=True, out_dtype=torch.float64)
    assert_as_good_as_eager(out, eager_variable(q, k, v, mask, tail=tail), exact)
    means = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) / math.sqrt(q.shape[-1])
    moved = means * torch.finfo(q.dtype).eps / 2 if tail else 0.0  # block means are rounded to the inputs' dtype
    limit = moved + 64 * torch.finfo(torch.float32).eps * max(1.0, float(exact_lse.abs().max()))
    assert (lse.double() - exact_lse).abs().max() <= limit


@pytest.mark.representative
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", [False, True])
def test_every_dtype(dtype: torch.dtype, tail: bool) -> None:
    check(random_variable(heads=2, tokens=83, blocks=(3, 5), dim=64, dtype=dtype), tail=tail)


@pytest.mark.representative
@pytest.mark.parametrize("tail", [False, True])
def test_blocks_longer_and_shorter_than_a_piece(tail: bool) -> None:
    call = random_variable(batch=2, heads=2, tokens=150, blocks=(3, 40), density=0.2, dim=32)
    assert int(call[3].q_sizes.max()) > 32 and int(call[3].kv_sizes.max()) < 16
    check(call, tail=tail, config=Config(32, 16, 4, 2))


@pytest.mark.parametrize("dim", [20, 128])
def test_channels_that_rows_have_to_be_padded_for(dim: int) -> None:
    check(random_variable(heads=1, tokens=50, dim=dim, dtype=torch.bfloat16), tail=True)


def test_more_blocks_than_tokens_and_twelve_heads() -> None:
    check(random_variable(heads=12, tokens=7, blocks=(9, 20), density=0.1), tail=True, config=Config(16, 16, 4, 2))


@pytest.mark.parametrize("tail", [False, True])
def test_heads_that_lie_behind_each_other_are_read_in_place(tail: bool) -> None:
    q, k, v, mask = random_variable(batch=2, heads=3, dim=32)
    moved = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(launch(*moved, mask, tail=tail), launch(q, k, v, mask, tail=tail))


def test_what_it_cannot_is_said() -> None:
    q, k, v, mask = random_variable()
    with pytest.raises(KernelError, match=r"scale is 0.0; .* positive"):
        launch(q, k, v, mask, scale=0.0)


def test_a_full_mask_has_an_empty_tail() -> None:
    call = random_variable(heads=2, tokens=70, blocks=(3, 5), density=1.0, dim=32)
    assert call[3].is_full()
    check(call, tail=True)
