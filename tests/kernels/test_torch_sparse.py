"""The gather path against the float64 oracle, with tolerances taken from eager attention's own error."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.helpers import assert_as_good_as_eager, eager, make_layout, random_mask, random_qkv
from tests.rounding import assert_rounded, rounding
from vidaccel.blockmask import BlockMask
from vidaccel.errors import KernelError, LayoutError
from vidaccel.kernels import dense, reference, schedule, tail, torch_sparse
from vidaccel.kernels.contract import KernelRequest
from vidaccel.layout import TokenLayout
from vidaccel.types import PRECISIONS, TileShape, VideoGrid

LAYOUTS = {
    "even": make_layout(),
    "ragged": make_layout((3, 7, 9)),
    "one block": make_layout((2, 3, 3), (2, 3, 3)),
    "text after": make_layout((3, 7, 9), text=13),
    "text before": make_layout((4, 8, 8), text=40, text_first=True),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask, use_tail: bool = False
) -> None:
    """Output and LSE against the oracle."""
    got, lse = torch_sparse.block_sparse_attention(q, k, v, layout, mask, tail=use_tail, return_lse=True)
    exact, exact_lse = reference.block_sparse_attention(
        q, k, v, layout, mask, tail=use_tail, return_lse=True, out_dtype=torch.float64
    )
    assert_as_good_as_eager(got, eager(q, k, v, layout, mask, use_tail), exact)
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    # of float32 sums; for 16-bit inputs torch's kernel uses a faster exp, good to a part of their unit
    bound = rounding(q.float(), k.float(), v.float()).lse
    assert_rounded(lse, exact_lse, bound if q.dtype is torch.float32 else bound + torch.finfo(q.dtype).eps / 4)


@pytest.mark.parametrize("use_tail", [False, True], ids=["dropped", "tail"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_matches_the_oracle(name: str, dtype: torch.dtype, use_tail: bool) -> None:
    layout = LAYOUTS[name]
    mask = random_mask(layout, 1, [0.1, 0.5, 1.0])
    check(*random_qkv(layout, 2, 3, dtype=dtype), layout, mask, use_tail)


@pytest.mark.parametrize("use_tail", [False, True], ids=["dropped", "tail"])
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("mask_axes", ["shared", "per head", "per batch", "per both"])
@pytest.mark.parametrize("name", ["even", "text after"])
def test_mask_axes_broadcast(name: str, mask_axes: str, heads: int, use_tail: bool) -> None:
    layout = LAYOUTS[name]
    densities = [0.3] if mask_axes in ("shared", "per batch") else [(h + 1) / heads for h in range(heads)]
    mask = random_mask(layout, 2 if mask_axes in ("per batch", "per both") else 1, densities)
    check(*random_qkv(layout, 2, heads), layout, mask, use_tail)


@pytest.mark.parametrize("text_first", [False, True], ids=["after", "before"])
def test_long_text_is_dense(text_first: bool) -> None:
    """513 text tokens, one more than four tiles hold: text queries keep everything, every query keeps the text."""
    layout = make_layout((4, 10, 12), (4, 4, 8), text=513, text_first=text_first)
    keep = random_mask(layout, 1, [0.2, 0.4]).dense.clone()
    keep[..., layout.text_blocks] = True
    keep[:, :, layout.text_blocks] = True
    check(*random_qkv(layout), layout, BlockMask.from_dense(keep), True)


@pytest.mark.parametrize("chunk", [1, 1 << 12, 1 << 30], ids=["one item a call", "a few", "all"])
@pytest.mark.parametrize("slab", [1, 1 << 30], ids=["head by head", "all heads"])
@pytest.mark.parametrize("shared", [False, True], ids=["per head", "shared"])
@pytest.mark.parametrize("name", ["even", "text after"])
def test_cutting_into_slabs_and_chunks(
    name: str, shared: bool, slab: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_sparse._CHUNK_BYTES, "cpu", chunk)
    monkeypatch.setitem(torch_sparse._SLAB_BYTES, "cpu", slab)
    monkeypatch.setattr(tail, "_MAX_LOGITS", 64)
    layout = LAYOUTS[name]
    # dense heads apart from each other, so that their keys are not one slice
    mask = random_mask(layout, 1, [0.3] if shared else [1.0, 0.3, 1.0, 1.0, 0.3])
    check(*random_qkv(layout, 1, 5), layout, mask, True)


@pytest.mark.parametrize("storage", ["transposed", "fused qkv", "reversed channels"])
def test_any_strides(storage: str) -> None:
    layout = LAYOUTS["text after"]
    b, s, h, d = 2, layout.tokens, 3, 16
    if storage == "transposed":
        q, k, v = (torch.randn(b, h, s, d).transpose(1, 2) for _ in range(3))
    elif storage == "fused qkv":
        q, k, v = torch.randn(b, s, 3, h, d).unbind(2)
    else:
        q, k, v = (torch.randn(b, s, d, h).transpose(2, 3) for _ in range(3))
    assert not q.is_contiguous()
    check(q, k, v, layout, random_mask(layout, 1, [0.2, 0.5, 1.0]), True)
    check(q, k, v, layout, BlockMask.full(layout))


def test_full_mask_equals_dense_attention() -> None:
    layout = LAYOUTS["ragged"]
    q, k, v = random_qkv(layout)
    got = torch_sparse.block_sparse_attention(q, k, v, layout, BlockMask.full(layout), tail=True)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.equal(got, want)


def test_scale_is_used() -> None:
    layout = LAYOUTS["even"]
    q, k, v = random_qkv(layout)
    mask = random_mask(layout, 1, [0.4])
    for use_tail in (False, True):
        got = torch_sparse.block_sparse_attention(q, k, v, layout, mask, scale=0.07, tail=use_tail)
        want = reference.block_sparse_attention(q, k, v, layout, mask, scale=0.07, tail=use_tail)
        assert_rounded(got, want, rounding(q, k, v, 0.07).out)


def test_tail_is_exact_for_constant_blocks() -> None:
    """If a block's tokens are alike its mean says everything, so sparse with the tail equals dense."""
    layout = LAYOUTS["text after"]
    blocks = torch.randn(2, 1, layout.num_blocks, 2, 16)
    k, v = blocks[:, :, layout.block_of_token]
    q = torch.randn(1, layout.tokens, 2, 16)
    mask = random_mask(layout, 1, [0.2, 0.3])
    full = BlockMask.full(layout)
    got, lse = torch_sparse.block_sparse_attention(q, k, v, layout, mask, tail=True, return_lse=True)
    want, want_lse = torch_sparse.block_sparse_attention(q, k, v, layout, full, return_lse=True)
    assert_rounded(got, want, rounding(q, k, v).out)
    assert_rounded(lse, want_lse, rounding(q, k, v).lse)


@st.composite
def cases(draw: st.DrawFn) -> tuple[TokenLayout, torch.Tensor, int, bool]:
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)))
    tile = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    layout = TokenLayout.of(
        VideoGrid(*grid), TileShape(*tile), text_tokens=draw(st.integers(0, 9)), text_first=draw(st.booleans())
    )
    n = layout.num_blocks
    heads = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from([1, heads])), n, n)
    keep = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    # any block will do, so that no row is empty; the diagonal is not assumed
    keep.scatter_(-1, torch.randint(n, (*shape[:3], 1), generator=generator), True)
    return layout, keep, heads, draw(st.booleans())


@given(cases())
def test_any_layout_and_mask(case: tuple[TokenLayout, torch.Tensor, int, bool]) -> None:
    layout, keep, heads, use_tail = case
    check(*random_qkv(layout, keep.shape[0], heads, 8), layout, BlockMask.from_dense(keep), use_tail)


def test_flex_attention_agrees() -> None:
    """A second oracle that shares no code with ours."""
    from torch.nn.attention.flex_attention import flex_attention

    layout = make_layout((4, 8, 16), (4, 4, 8))
    q, k, v = random_qkv(layout)
    mask = random_mask(layout, 1, [0.3, 0.6])
    want = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask.to_flex(layout)).transpose(1, 2)
    got = torch_sparse.block_sparse_attention(q, k, v, layout, mask)
    assert_rounded(got, want, rounding(q, k, v).out)


def test_explicit_attention_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices without a flash kernel run, in several cuts of the rows."""
    monkeypatch.setattr(dense, "_MAX_SCORES", 200)
    q, k, v = (torch.randn(2, 3, length, 8) for length in (17, 11, 11))
    got, lse = dense.explicit_attention(q, k, v, 0.3)
    scores = (q.double() @ k.double().mT) * 0.3
    bound = rounding(q.transpose(1, 2), k.transpose(1, 2), v, 0.3)
    assert_rounded(got, scores.softmax(-1) @ v.double(), bound.out)
    assert_rounded(lse, scores.logsumexp(-1), bound.lse)


def test_rows_with_one_list_share_a_gather() -> None:
    layout = LAYOUTS["even"]
    keep = torch.eye(layout.num_blocks, dtype=torch.bool)
    keep[:3] = keep[0] | keep[1] | keep[2]
    keep[3] = True
    groups = schedule.schedule(BlockMask.from_dense(keep), layout, torch.device("cpu")).groups[0]
    size = layout.tile_shape.tokens
    found = {(g.queries // size, g.keys // size, g.full, len(g)) for g in groups}
    n = layout.num_blocks
    assert found == {(3, 3, False, 1), (1, n, True, 1), (1, 1, False, n - 4)}


def test_schedule_is_cached_and_goes_with_the_mask() -> None:
    layout = LAYOUTS["even"]
    mask = random_mask(layout, 1, [0.3])
    cpu = torch.device("cpu")
    first = schedule.schedule(mask, layout, cpu)
    assert schedule.schedule(mask, layout, cpu) is first
    gone = weakref.ref(first)
    del first, mask
    gc.collect()
    assert gone() is None


def test_schedule_made_in_inference_mode_serves_training() -> None:
    layout = LAYOUTS["text after"]
    q, k, v = random_qkv(layout)
    mask = random_mask(layout, 1, [0.3])
    with torch.inference_mode():
        torch_sparse.block_sparse_attention(q, k, v, layout, mask)
    q.requires_grad_(True)
    torch_sparse.block_sparse_attention(q, k, v, layout, mask).sum().backward()
    got, q.grad = q.grad, None
    eager(q, k, v, layout, mask).sum().backward()
    low, wide = q.grad, q.detach().double().requires_grad_()
    eager(wide, k.double(), v.double(), layout, mask).sum().backward()
    assert got is not None and low is not None and wide.grad is not None
    assert_as_good_as_eager(got, low, wide.grad)


def test_nothing_of_size_l_by_l(monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest tensor that any torch function returns, in elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().size() // x.element_size())
            return result

    monkeypatch.setitem(torch_sparse._CHUNK_BYTES, "cpu", 1 << 16)
    layout = make_layout((8, 16, 16), (4, 4, 4), text=13)
    q, k, v = random_qkv(layout, 1, 2)
    mask = random_mask(layout, 1, [0.1, 0.5])
    schedule.schedule(mask, layout, torch.device("cpu"))
    with Largest() as largest:
        torch_sparse.block_sparse_attention(q, k, v, layout, mask, tail=True)
    assert q.numel() <= largest.elements <= 2 * q.numel() < layout.tokens**2


def test_why_not() -> None:
    def request(device: str = "cpu", dtype: torch.dtype = torch.float32, precision: str = "native") -> KernelRequest:
        return KernelRequest(device, dtype, 64, PRECISIONS[precision], True, True)

    assert torch_sparse.why_not(request()) is None
    assert torch_sparse.why_not(request(device="mps", dtype=torch.float16)) is None
    assert "'int8' is quantised" in str(torch_sparse.why_not(request(precision="int8")))
    assert "float64 is not supported" in str(torch_sparse.why_not(request(dtype=torch.float64)))
    assert "meta" in str(torch_sparse.why_not(request(device="meta")))


def test_refuses_what_it_cannot_run() -> None:
    layout = LAYOUTS["even"]
    q, k, v = random_qkv(layout)
    mask = random_mask(layout, 1, [0.3])
    run = torch_sparse.block_sparse_attention
    with pytest.raises(KernelError, match="quantised"):
        run(q, k, v, layout, mask, precision=PRECISIONS["int8"])
    with pytest.raises(KernelError, match="one dtype"):
        run(q, k.half(), v, layout, mask)
    with pytest.raises(LayoutError, match="one shape"):
        run(q, k[:, 1:], v, layout, mask)
    with pytest.raises(LayoutError, match="has 255 tokens"):
        run(q[:, 1:], k[:, 1:], v[:, 1:], layout, mask)
    with pytest.raises(LayoutError, match="1x3"):
        run(q, k, v, layout, random_mask(layout, 1, [0.3] * 3))
    with pytest.raises(LayoutError, match="build the mask from this layout"):
        run(q, k, v, layout, BlockMask.full(LAYOUTS["ragged"]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 44, 128])
def test_cuda_matches_the_oracle(dim: int, dtype: torch.dtype) -> None:
    layout = LAYOUTS["text after"]
    mask = random_mask(layout, 1, [0.1, 0.5, 1.0])
    q, k, v = random_qkv(layout, 2, 3, dim, dtype)
    cuda = [x.cuda() for x in (q, k, v)]
    got, lse = torch_sparse.block_sparse_attention(*cuda, layout, mask.to("cuda"), tail=True, return_lse=True)
    exact, exact_lse = reference.block_sparse_attention(
        q, k, v, layout, mask, tail=True, return_lse=True, out_dtype=torch.float64
    )
    assert_as_good_as_eager(got.cpu(), eager(q, k, v, layout, mask, True), exact)
    assert math.isclose((lse.cpu() - exact_lse).abs().max().item(), 0.0, abs_tol=1e-3)
