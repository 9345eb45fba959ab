"""FlexAttention with our lists of blocks: padding, rules over tokens and the tail; compiled for this CPU.

A CPU compiles no LSE, so that is checked with torch's uncompiled version, which reads the mask function instead of the
lists.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import vidaccel
from tests.kernels.helpers import assert_as_good_as_eager, eager, make_layout, random_mask, random_qkv
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo.wan import CASES as PIPELINES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.blockmask import BlockMask
from vidaccel.device import has_cpp_compiler
from vidaccel.errors import KernelError
from vidaccel.kernels import flex, reference
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import select, why_not_table
from vidaccel.layout import TokenLayout
from vidaccel.patterns.registry import build_static
from vidaccel.types import PRECISIONS

NATIVE = PRECISIONS["native"]

pytestmark = pytest.mark.skipif(not has_cpp_compiler(), reason="FlexAttention needs a C++ compiler on a CPU")


@pytest.fixture(autouse=True)
def no_warnings_of_torch() -> Iterator[None]:
    """That uncompiled FlexAttention is slow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def made(compiled: bool, q: Any, k: Any, v: Any, layout: TokenLayout, mask: BlockMask, **options: Any) -> Any:
    with torch.no_grad():
        return flex.block_sparse_attention(q, k, v, layout, mask, compiled=compiled, **options)


def check(compiled: bool, q: Any, k: Any, v: Any, layout: TokenLayout, mask: BlockMask, tail: bool) -> None:
    """As good as eager attention in the same dtype; the LSE as well, where it is computed."""
    exact, exact_lse = reference.block_sparse_attention(
        q, k, v, layout, mask, tail=tail, return_lse=True, out_dtype=torch.float64
    )
    low = eager(q, k, v, layout, mask, tail)
    if compiled:
        assert_as_good_as_eager(made(True, q, k, v, layout, mask, tail=tail), low, exact)
        return
    out, lse = made(False, q, k, v, layout, mask, tail=tail, return_lse=True)
    assert_as_good_as_eager(out, low, exact)
    scale = q.shape[-1] ** -0.5
    largest = float((q.double().abs().transpose(1, 2) @ k.double().abs().transpose(1, 2).mT).max()) * scale
    # sums of D products in float32, and in 16 bits one more rounding of the means
    allowed = largest * (q.shape[-1] * 2.0**-24 + (torch.finfo(q.dtype).eps if tail else 0)) + 2.0**-20
    assert lse.dtype == torch.float32 and float((lse.double() - exact_lse).abs().max()) <= allowed


#: Layouts of all kinds; each is compiled once for each dtype, head size and tail.
LAYOUTS: dict[str, TokenLayout] = {
    "uniform": make_layout((4, 8, 8), (2, 4, 4)),
    "uniform, 32 tokens": make_layout((4, 8, 6), (2, 4, 4), text=32),
    "ragged": make_layout((5, 7, 6), (2, 4, 4)),
    "ragged with text": make_layout((3, 5, 7), (2, 2, 4), text=13),
    "text first": make_layout((3, 5, 7), (2, 2, 4), text=17, text_first=True),
    "one block": make_layout((2, 3, 4), (2, 3, 4)),
    "more blocks than a block has tokens": make_layout((5, 5, 7), (1, 1, 2)),
}


def draws(layout: TokenLayout, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask]:
    """q, k and v of two videos and three heads, of which one keeps its own blocks alone and one everything."""
    torch.manual_seed(seed)
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    mask = random_mask(layout, 2, [0.0, random.Random(seed).random(), 1.0])
    return *random_qkv(layout, 2, 3, 32, dtype), mask


@pytest.mark.parametrize(("seed", "tail"), itertools.product((0, 1), (False, True)))
@pytest.mark.parametrize("name", LAYOUTS)
def test_uncompiled_it_is_as_good_as_eager(name: str, seed: int, tail: bool) -> None:
    q, k, v, mask = draws(LAYOUTS[name], seed)
    check(False, q, k, v, LAYOUTS[name], mask, tail)


@pytest.mark.full
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("name", ["ragged with text", "uniform"])
def test_compiled_it_is_as_good_as_eager(name: str, tail: bool) -> None:
    q, k, v, mask = draws(LAYOUTS[name], 0)
    check(True, q, k, v, LAYOUTS[name], mask, tail)


@pytest.mark.slow
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_200_calls(name: str, tail: bool) -> None:
    """15 for each layout, with and without a tail; compiled twice, for two dtypes."""
    for seed in range(15):
        q, k, v, mask = draws(LAYOUTS[name], seed)
        check(True, q, k, v, LAYOUTS[name], mask, tail)


def test_a_wrong_list_is_found() -> None:
    """What these tests compare with can tell."""
    layout = LAYOUTS["ragged with text"]
    q, k, v, mask = draws(layout, 0)
    fewer = BlockMask((mask.kv_num_blocks - 1).clamp(min=1), mask.kv_indices)
    exact = reference.block_sparse_attention(q, k, v, layout, mask, out_dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(made(False, q, k, v, layout, fewer), eager(q, k, v, layout, mask), exact)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("tail", [False, True])
def test_a_rule_over_tokens(compiled: bool, tail: bool) -> None:
    """NATTEN's windows cut blocks; each head has a rule of its own."""
    layout = make_layout((5, 6, 7), (2, 4, 4), text=13)
    windows = ([3, 3, 5], [5, 5, 3])  # in tokens
    masks = [
        build_static(PatternSpec.make("neighborhood", window=window, exact=True)).mask(layout) for window in windows
    ]
    mask = BlockMask.stack(masks, layout)
    assert mask.rule is not None and mask.rule.heads == 2 and bool(mask.partial.any())
    torch.manual_seed(0)
    q, k, v = random_qkv(layout, 1, 2, 32)
    check(compiled, q, k, v, layout, mask, tail)


@pytest.mark.full
def test_strides_of_models() -> None:
    """Views of one projection, and heads that are no neighbors."""
    layout = LAYOUTS["ragged with text"]
    torch.manual_seed(0)
    mask = random_mask(layout, 1, [0.5, 0.2])
    joint = torch.randn(1, layout.tokens, 3, 4, 32)
    q, k, v = (joint[:, :, i, ::2] for i in range(3))
    check(True, q, k, v, layout, mask, tail=False)


# -- when it runs -----------------------------------------------------------------------------------------------------


def request(**changes: Any) -> KernelRequest:
    return replace(KernelRequest("cpu", torch.float32, 64, NATIVE), **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device": "mps"}, "not for mps"),
        ({"precision": PRECISIONS["int8"]}, "'int8' is quantised"),
        ({"dtype": torch.float64}, "float64 is not supported"),
        ({"skip": True}, "cannot skip blocks"),
        ({"head_dim": 8}, "16 channels a head or more, not 8"),
        ({"return_lse": True}, "gives no LSE"),
        ({"variable": True}, "not of variable size"),
    ],
)
def test_what_it_cannot_do_is_said(changes: dict[str, Any], text: str) -> None:
    assert text in str(why_not_table(request(**changes))["flex"])


def test_on_a_cpu_it_runs_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(request()).name == "torch-sparse"
    assert select(request(), prefer="flex").name == "flex"
    assert why_not_table(request(device="cuda", return_lse=True))["flex"] is None
    monkeypatch.setattr(flex, "has_cpp_compiler", lambda: False)
    with pytest.raises(KernelError, match="needs a C"):
        select(request(), prefer="flex")


def test_on_a_gpu_without_our_kernels_it_comes_first() -> None:
    failed = {"triton": "its self-test failed"}
    assert select(request(device="cuda"), failed=failed).name == "flex"
    assert select(request(device="xpu", dtype=torch.bfloat16)).name == "flex"


@pytest.mark.full
def test_a_pipeline_runs_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Tested first, because it is compiled here, and then as right as gathering."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = PIPELINES[0]
    window = LayerPolicy((HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1])),))
    plan = Plan("test", (Rule(window),), tile=TileShape(2, 2, 2))
    videos = {}
    for kernel in (None, "flex"):
        pipe = case.make()
        session = vidaccel.patch(pipe, plan, strict=True, kernel=kernel)
        videos[kernel] = case.run(pipe)
        assert set(session.report().kernels) == {kernel or "torch-sparse"}
    assert_rounded(videos["flex"], videos[None], bound_of_case(case))
    assert len(list(tmp_path.rglob("flex-*.json"))) == 1, "it was tested"


def test_more_shapes_than_torch_would_compile_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would run the uncompiled version, with every score in memory, and say nothing that a report could."""
    assert flex._MOST_SHAPES > 100
    calls: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        calls.append(options)
        return lambda *tensors, **kwargs: torch._dynamo.config.recompile_limit

    monkeypatch.setattr(torch, "compile", compile_)
    flex._flex.cache_clear()
    try:
        assert flex._flex(True)() == flex._MOST_SHAPES
    finally:
        flex._flex.cache_clear()
    assert calls == [{"dynamic": False, "fullgraph": True}]
