"""Small kernels compiled by Triton for each architecture: copies by lanes and by tile, products of every format.

Triton computes the addresses of swizzled operands itself where it copies with cp.async and multiplies with wgmma, so a
swizzle that is wrong in tiles and in wgmma alike is noticed here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tests.kernels.triton.ptx.emulator import Emulator, Fault, emulating  # noqa: E402

pytestmark = pytest.mark.representative

ARCHES = [80, 86, 89, 90, 120]


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(x, out, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n, other=float("-inf"))
    v = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * n + i, v / tl.sum(v, 0), mask=i < n)


@triton.jit
def matmul(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, INTEGER: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros([M, N], tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        y = tl.load(b + n[None, :] * K + (start + k)[:, None])
        acc = tl.dot(x, y, acc, out_dtype=acc.dtype)
    tl.store(out + m[:, None] * N + n[None, :], acc)


@triton.jit
def matmul_of_tiles(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    left = tl.make_tensor_descriptor(a, [M, K], [K, 1], [M, BK])
    right = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BK, N])
    result = tl.make_tensor_descriptor(out, [M, N], [N, 1], [M, N])
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BK):
        acc = tl.dot(left.load([0, start]), right.load([start, 0]), acc)
    result.store([0, 0], acc.to(tl.bfloat16))


@triton.jit
def to_fp8(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(tl.float8e4nv))


@pytest.fixture
def scratch() -> Any:
    """Memory for what a kernel makes itself."""
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8))


@pytest.mark.parametrize("arch", ARCHES)
def test_sums_and_softmax(arch: int) -> None:
    x, y = torch.randn(1000), torch.randn(1000)
    out, rows, soft = torch.zeros(1000), torch.randn(3, 300), torch.zeros(3, 300)
    with emulating(Emulator(arch, schedule="random", asynchronous="random")) as emulator:
        add[(4,)](x, y, out, 1000, BLOCK=256)
        softmax[(3,)](rows, soft, 300, BLOCK=512)
    assert torch.equal(out, x + y)
    assert torch.allclose(soft, rows.softmax(1), rtol=1e-5, atol=1e-7)
    assert emulator.faults == [] and [entry.ctas for entry in emulator.log] == [4, 3]


def operands(kind: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "int8":
        return torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn}[kind]
    a, b = torch.randn(m, k), torch.randn(n, k)
    if kind == "tf32":  # numbers that tf32 has, so that the products are exact
        a, b = a.bfloat16().float(), b.bfloat16().float()
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32", "int8", "e4m3"])
@pytest.mark.parametrize("arch", ARCHES)
def test_products(arch: int, kind: str) -> None:
    if kind == "e4m3" and arch < 89:
        pytest.skip("fp8 products exist from sm_89 on")
    k = 128
    a, b = operands(kind, 64, 64, k)
    out = torch.zeros(64, 64, dtype=torch.int32 if kind == "int8" else torch.float32)
    with emulating(Emulator(arch)) as emulator:
        matmul[(1,)](a, b, out, k, M=64, N=64, BK=64 if kind != "tf32" else 32, INTEGER=kind == "int8", num_warps=4)
    exact = a.double() @ b.double().T
    # sums are exact in the emulator and rounded once for each product of a block
    assert (out.double() - exact).abs().max() <= 2.0**-20 * exact.abs().max()
    (entry,) = emulator.log
    assert entry.wgmma if arch == 90 else entry.mma
    assert emulator.errors == [] and all(fault.kind == "proxy" for fault in emulator.faults)


@pytest.mark.parametrize("asynchronous", ["late", "early", "random"])
@pytest.mark.parametrize("arch", [90, 120])
def test_products_of_tiles(arch: int, asynchronous: str, scratch: None) -> None:
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16()
    out = torch.zeros(64, 64, dtype=torch.bfloat16)
    with emulating(Emulator(arch, asynchronous=asynchronous, schedule="random", seed=5)) as emulator:
        matmul_of_tiles[(1,)](a, b, out, 128, M=64, N=64, BK=64, num_warps=4, num_stages=2)
    exact = a.double() @ b.double()
    assert (out.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
    assert emulator.log[0].tma == 5 and emulator.errors == []


@pytest.mark.parametrize("arch", [89, 90, 120])
def test_float32_to_fp8(arch: int) -> None:
    """Triton 3.6 rounds twice on sm_89: towards zero to float16, then to nearest. Each way is executed as it is."""
    x = torch.cat([torch.randn(1000) * 10, torch.tensor([0.0, -0.0, 448.0, 1e-9, 1.0625, 1.1875, 1e-3, 2.0**-9] * 3)])
    # just beside the middle of two numbers of e4m3
    x[:500] = x[:500].to(torch.float8_e4m3fn).float() * (1 + 2.0**-4 + 2.0**-13)
    out = torch.zeros(1024, dtype=torch.float8_e4m3fn)
    texts: list[str] = []
    with emulating(Emulator(arch, edit=lambda text: texts.append(text) or text)) as emulator:
        to_fp8[(1,)](x, out, BLOCK=1024)
    once, half = x.to(out.dtype), x.half()
    cut = torch.where(half.float().abs() > x.abs(), (half.view(torch.int16) - 1).view(torch.float16), half)
    twice = cut.float().to(out.dtype)
    assert not torch.equal(once.view(torch.uint8), twice.view(torch.uint8))
    wanted = twice if "cvt.rz.f16.f32" in texts[0] else once
    assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8)) and emulator.faults == []


@pytest.mark.triton("3.6")
def test_fences_that_triton_leaves_out_are_advice_or_errors() -> None:
    """Before a wgmma of what cp.async has copied, Triton 3.6 has no fence.proxy.async; 3.9 has."""
    a, b = operands("bf16", 64, 64, 64)
    found = {}
    for proxies in ("advice", "error"):
        out = torch.zeros(64, 64)
        with emulating(Emulator(90, proxies=proxies)) as emulator:
            matmul[(1,)](a, b, out, 64, M=64, N=64, BK=64, INTEGER=False, num_warps=4)
        assert {fault.kind for fault in emulator.faults} == {"proxy"}
        found[proxies] = emulator.errors
    assert found["advice"] == [] and len(found["error"]) == len(emulator.faults)


def test_a_store_outside_of_a_tensor_is_found() -> None:
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(900)
    emulator = Emulator(80, only=lambda x, y, z: x == 3)
    with pytest.raises(Fault) as found, emulating(emulator):
        add[(4,)](x, y, out, 1000, BLOCK=256)
    assert found.value.kind == "bounds" and "(900,)" in str(found.value) and emulator.faults == [found.value]


def test_edits_and_options_that_do_not_exist() -> None:
    x, y, out = torch.ones(256), torch.ones(256), torch.zeros(256)
    with emulating(Emulator(80, edit=lambda text: text.replace("add.f32", "sub.f32"))):
        add[(1,)](x, y, out, 256, BLOCK=256)
    assert not out.any()
    for name in ("asynchronous", "schedule", "proxies"):
        with pytest.raises(ValueError, match="valid are"):
            Emulator(80, **{name: "sometimes"})
