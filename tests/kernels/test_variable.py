"""Blocks of variable size: the gather path and the oracle against a softmax written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.helpers import assert_as_good_as_eager
from tests.kernels.variables import eager_variable, random_variable
from tests.rounding import assert_rounded, rounding
from vidaccel.errors import KernelError, LayoutError
from vidaccel.kernels import variable
from vidaccel.kernels.contract import KernelRequest, Skips
from vidaccel.kernels.dispatch import kernels, select
from vidaccel.layout import TokenLayout
from vidaccel.types import PRECISIONS, VideoGrid
from vidaccel.variablemask import VariableBlockMask


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: VariableBlockMask, *, tail: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query at a time, in float64: its own block's list of key blocks, and one key for each block it skips."""
    out, lse = torch.empty(q.shape, dtype=torch.float64), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            queries, keys, values = (x[b, :, h].double() for x in (q, k, v))
            sizes = mask.kv_sizes[b, h].tolist()
            row = 0
            for i, count in enumerate(mask.q_sizes[b, h].tolist()):
                for query in queries[row : row + count]:
                    scores, rows, at = [], [], 0
                    for j, size in enumerate(sizes):
                        block = slice(at, at + size)
                        at += size
                        if mask.keep[b, h, i, j]:
                            scores += (keys[block] @ query / math.sqrt(len(query))).tolist()
                            rows += list(values[block])
                        elif tail and size:
                            scores.append(float(keys[block].mean(0) @ query) / math.sqrt(len(query)) + math.log(size))
                            rows.append(values[block].mean(0))
                    weights = torch.tensor(scores, dtype=torch.float64)
                    out[b, row, h] = weights.softmax(0) @ torch.stack(rows)
                    lse[b, h, row] = weights.logsumexp(0)
                    row += 1
    return out, lse


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_it_is_its_definition(tail: bool, density: float) -> None:
    q, k, v, mask = random_variable(batch=2, heads=3, tokens=61, blocks=(5, 9), density=density)
    exact, exact_lse = written_out(q, k, v, mask, tail=tail)
    told, told_lse = variable.oracle(q, k, v, mask, tail=tail, return_lse=True, out_dtype=torch.float64)
    torch.testing.assert_close(told, exact)
    torch.testing.assert_close(told_lse.float(), exact_lse)
    out, lse = variable.variable_block_attention(q, k, v, mask, tail=tail, return_lse=True)
    assert_as_good_as_eager(out, eager_variable(q, k, v, mask, tail=tail), exact)
    assert_rounded(lse, exact_lse, rounding(q, k, v).lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", [False, True])
def test_every_dtype_and_stride(dtype: torch.dtype, tail: bool) -> None:
    q, k, v, mask = random_variable(batch=1, heads=12, tokens=97, blocks=(4, 6), density=0.4, dtype=dtype)
    fused = torch.cat([q, k, v], dim=-1)
    q, k, v = fused.split(q.shape[-1], dim=-1)
    assert not q.is_contiguous()
    out = variable.variable_block_attention(q, k, v, mask, tail=tail)
    exact = variable.oracle(q, k, v, mask, tail=tail, out_dtype=torch.float64)
    assert_as_good_as_eager(out, eager_variable(q, k, v, mask, tail=tail), exact)


def test_a_scale_of_ones_own() -> None:
    q, k, v, mask = random_variable()
    out = variable.variable_block_attention(q, k, v, mask, scale=0.7, tail=True)
    exact = variable.oracle(q, k, v, mask, scale=0.7, tail=True, out_dtype=torch.float64)
    bound = rounding(q, k, v, 0.7).out
    assert_rounded(out, exact, bound)
    assert float((out - variable.variable_block_attention(q, k, v, mask, tail=True)).abs().max()) > 100 * bound


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_any_blocks(seed: int, heads: int, tokens: int, rows: int, columns: int) -> None:
    """More blocks than tokens, blocks of nothing, one block: the mask's own words agree with its token pairs."""
    torch.manual_seed(seed)
    q, k, v, mask = random_variable(heads=heads, tokens=tokens, blocks=(rows, columns), density=0.3)
    layout = TokenLayout.of(VideoGrid(1, 1, tokens))
    pairs = mask.token_mask(layout)
    assert mask.density(layout) == pytest.approx(float(pairs.double().mean()))
    assert mask.is_full() == bool(pairs.all())
    out = variable.variable_block_attention(q, k, v, mask, tail=True)
    exact = variable.oracle(q, k, v, mask, tail=True, out_dtype=torch.float64)
    assert_as_good_as_eager(out, eager_variable(q, k, v, mask, tail=True), exact)


def test_kernels_say_what_they_cannot() -> None:
    q, k, v, mask = random_variable(tokens=24)
    layout = TokenLayout.of(VideoGrid(2, 3, 4))
    native, int8 = PRECISIONS["native"], PRECISIONS["int8"]
    kernel = select(KernelRequest.of(q, native, tail=True, variable=True))
    assert kernel.name == "torch-sparse"
    assert torch.equal(
        kernel(q, k, v, layout, mask, tail=True), variable.variable_block_attention(q, k, v, mask, tail=True)
    )
    with pytest.raises(
        KernelError, match=r"inputs' dtype only, .* torch-sparse: .*emulated: computes blocks of the layout"
    ):
        select(KernelRequest.of(q, int8, variable=True))
    with pytest.raises(KernelError, match="without skipping"):
        select(KernelRequest.of(q, native, skip=True, variable=True), prefer="torch-sparse")
    emulated = next(one for one in kernels() if one.name == "emulated")
    with pytest.raises(KernelError, match="emulated computes blocks of the layout only"):
        emulated(q, k, v, layout, mask)
    with pytest.raises(KernelError, match="not with precision 'int8'"):
        variable.variable_block_attention(q, k, v, mask, precision=int8)
    with pytest.raises(KernelError, match="not with skipping"):
        variable.variable_block_attention(q, k, v, mask, skips=Skips.of(-1.0, q))


def test_mistakes_are_named() -> None:
    q, k, v, mask = random_variable(tokens=24)
    layout = TokenLayout.of(VideoGrid(2, 3, 3))
    with pytest.raises(LayoutError, match="hold 24 tokens, but .* has 18"):
        mask.density(layout)
    for tensors, says in (
        ((q[:, :20], k[:, :20], v[:, :20]), "blocks of 24 tokens in 1x2 .* do not fit"),
        ((q, k[:, :20], v), "three"),
        ((q, k.half(), v), "convert them to one dtype"),
    ):
        with pytest.raises((LayoutError, KernelError), match=says):
            variable.variable_block_attention(*tensors, mask)
    keep, rows, columns = mask.keep, mask.q_sizes, mask.kv_sizes
    for make, says in (
        (lambda: VariableBlockMask(keep[0], rows, columns), "do not fit together"),
        (lambda: VariableBlockMask(keep, columns[..., :-1], columns), "do not fit together"),
        (lambda: VariableBlockMask(keep.int(), rows, columns), "torch.bool and twice"),
        (lambda: VariableBlockMask(keep, rows.int(), columns), "torch.bool and twice"),
        (lambda: VariableBlockMask(keep, rows + 1, columns), "must hold the whole sequence"),
        (lambda: VariableBlockMask(keep & False, rows, columns), r"row .*\[0, 0, 0\] of a block mask keeps no key"),
    ):
        with pytest.raises(LayoutError, match=says):
            make()
