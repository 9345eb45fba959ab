"""Products of a warpgroup: descriptors, layouts and swizzles, byte by byte, and what must be waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.ptx.emulator import Fault
from tests.kernels.triton.ptx.opcodes.programs import Run, run
from tests.kernels.triton.ptx.opcodes.test_matrix import a_fragment, c_fragment, matrix, registers

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(4)
Array = np.ndarray[Any, Any]
#: Bytes of a swizzled row -> the two bits of the descriptor.
SWIZZLES = {16: 0, 128: 1, 64: 2, 32: 3}
K_BYTES = 32


def place(row: int, byte: int, span: int, leading: int, stride: int) -> int:
    """Where a byte along k of a row of a K-major operand lies: 8 rows of ``span`` bytes form an atom; in it the 16-byte
    piece number p of line number l (128 bytes each) is at piece p ^ (l % (span / 16)) of the line."""
    if span == 16:
        return row % 8 * 16 + row // 8 * stride + byte // 16 * leading + byte % 16
    offset = row % 8 * span + row // 8 * stride + byte
    line, piece, rest = offset // 128, offset % 128 // 16, offset % 16
    return line * 128 + (piece ^ line % (span // 16)) * 16 + rest


def transposed_place(row: int, k: int, span: int, leading: int, stride: int) -> int:
    """The same for numbers of 2 bytes that lie along the rows: an atom has ``span / 2`` rows and 8 of k."""
    wide = span // 2
    if span == 16:
        return row % 8 * 2 + row // 8 * stride + k % 8 * 16 + k // 8 * leading
    offset = row % wide * 2 + row // wide * leading + k % 8 * span + k // 8 * stride
    line, piece, rest = offset // 128, offset % 128 // 16, offset % 16
    return line * 128 + (piece ^ line % (span // 16)) * 16 + rest


def descriptor(start: int, span: int, leading: int, stride: int) -> str:
    return f"{start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[span] << 62:#x}"


#: Fills 32 KiB of shared memory from %image, so that all warps and the asynchronous proxy see it.
FILL = """
mov.u32 %base, smem; shl.b32 %at, %thread, 4; cvt.u64.u32 %wide, %at;
add.u64 %from, %image, %wide; add.u32 %at, %at, %base;
mov.u32 %n, 0;
FILL:
ld.global.v4.b32 {%w0, %w1, %w2, %w3}, [%from]; st.shared.v4.b32 [%at], {%w0, %w1, %w2, %w3};
add.u64 %from, %from, 2048; add.u32 %at, %at, 2048; add.u32 %n, %n, 1;
setp.lt.u32 %more, %n, 16; @%more bra FILL;
fence.proxy.async.shared::cta; bar.sync 0;
"""
DECLARE = ".reg .b32 %base, %at, %n, %w<4>; .reg .b64 %wide, %from, %da, %db, %start; .reg .pred %more;"
ADDRESS = "cvt.u64.u32 %start, %base; shr.u64 %start, %start, 4; add.u64 %da, %start, {a}; add.u64 %db, %start, {b};"
SIZE = 1 << 15


def wgmma(
    kind: str,
    n: int,
    image: Array,
    da: str,
    db: str,
    tail: str,
    a: Array | None = None,
    before: str = "",
    after: str = "",
    c: Array | None = None,
    **options: Any,
) -> Run:
    k = {"bf16": 16, "f16": 16, "tf32": 8}.get(kind, 32)
    d = "s32" if kind in ("s8", "u8") else "f32"
    first = "%da" if a is None else registers("a", 4)
    start = "" if c is not None else "".join(f"mov.b32 %d{i}, 0;" for i in range(n // 2))
    start = "".join(f"mov.b32 %d{i}, %c{i};" for i in range(n // 2)) if c is not None else start
    body = (
        FILL + ADDRESS.format(a=da, b=db) + start + before + "wgmma.fence.sync.aligned;"
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{kind}.{kind} {registers('d', n // 2)}, {first}, %db, {tail};"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" + after
    )
    inputs = {} if a is None else {"a": a}
    inputs |= {} if c is None else {"c": c}
    outputs = {"d": (n // 2, np.int32 if d == "s32" else np.float32)}
    return run(body, inputs, outputs, arrays={"image": image}, registers=DECLARE, warps=4, shared=SIZE, **options)


def spread(values: Array) -> Array:
    """Accumulators ``[64, n]`` of a warpgroup: warp w has rows 16 w to 16 w + 15."""
    return np.concatenate([c_fragment(values[16 * w : 16 * w + 16]) for w in range(4)], axis=1)


def close(got: Array, wanted: Array) -> bool:
    return bool(np.abs(got - wanted).max() <= 2.0**-21 * np.abs(wanted).max())


@pytest.mark.parametrize("span", SWIZZLES)
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32", "s8", "e4m3"])
def test_operands_along_k(kind: str, span: int) -> None:
    item = {"bf16": 2, "f16": 2, "tf32": 4}.get(kind, 1)
    n, k = 24 if kind != "s8" else 32, K_BYTES // item
    (abits, a), (bbits, b) = matrix(kind, 64, k), matrix(kind, n, k)
    image = RANDOM.integers(0, 256, SIZE).astype(np.uint8)
    strides = {"a": (256, 1024 + 8 * span), "b": (1024, 2048)}
    for start, bits, (leading, stride) in ((0, abits, strides["a"]), (16384, bbits, strides["b"])):
        stride = stride if span == 16 else -(-stride // (8 * span)) * 8 * span
        raw = bits.view(np.uint8).reshape(len(bits), K_BYTES)
        for row in range(len(raw)):
            for byte in range(K_BYTES):
                image[start + place(row, byte, span, leading, stride)] = raw[row, byte]
    sa = strides["a"][1] if span == 16 else -(-strides["a"][1] // (8 * span)) * 8 * span
    tail = "1, 1, 1" + (", 0, 0" if item == 2 else "") if kind not in ("s8",) else "1"
    got = wgmma(kind, n, image, descriptor(0, span, 256, sa), descriptor(16384, span, 1024, 2048), tail)
    assert not got.faults
    wanted = spread(a @ b.T)
    assert (got["d"] == wanted).all() if kind == "s8" else close(got["d"], wanted)


@pytest.mark.parametrize("span", SWIZZLES)
def test_operands_along_their_rows(span: int) -> None:
    n = 128
    (abits, a), (bbits, b) = matrix("bf16", 64, 16), matrix("bf16", n, 16)
    image = RANDOM.integers(0, 256, SIZE).astype(np.uint8)
    atom = 8 * span
    sizes = {
        0: (4 * atom, 2 * atom) if span > 16 else (1536, 128),
        16384: (2 * atom, atom) if span > 16 else (2048, 128),
    }
    if span == 16:
        sizes = {0: (2048, 256), 16384: (4096, 128)}
    elif span == 32:
        sizes = {0: (2 * atom, atom), 16384: (2 * atom, atom)}
    for start, bits in ((0, abits), (16384, bbits)):
        raw = bits.view(np.uint8).reshape(len(bits), 16, 2)
        for row in range(len(raw)):
            for k in range(16):
                at = start + transposed_place(row, k, span, *sizes[start])
                image[at : at + 2] = raw[row, k]
    got = wgmma(
        "bf16", n, image, descriptor(0, span, *sizes[0]), descriptor(16384, span, *sizes[16384]), "1, 1, 1, 1, 1"
    )
    assert not got.faults and close(got["d"], spread(a @ b.T))


def simple(kind: str = "bf16", n: int = 16) -> tuple[Array, Array, Array]:
    """An image with B [n, k] without swizzle at 16384, and A [64, k] at 0; and their values."""
    k = 16
    (abits, a), (bbits, b) = matrix(kind, 64, k), matrix(kind, n, k)
    image = RANDOM.integers(0, 256, SIZE).astype(np.uint8)
    for start, bits in ((0, abits), (16384, bbits)):
        raw = bits.view(np.uint8).reshape(len(bits), K_BYTES)
        for row in range(len(raw)):
            for byte in range(K_BYTES):
                image[start + place(row, byte, 16, 128, 256)] = raw[row, byte]
    simple.bits = abits  # type: ignore[attr-defined]
    return image, a, b


PLAIN = (descriptor(0, 16, 128, 256), descriptor(16384, 16, 128, 256))


def test_a_from_registers_accumulation_and_negation() -> None:
    image, a, b = simple()
    bits = simple.bits  # type: ignore[attr-defined]
    fragment = np.concatenate([a_fragment(bits[16 * w : 16 * w + 16]) for w in range(4)], axis=1)
    c = RANDOM.normal(size=(64, 16)).astype(np.float32)
    fc = spread(c)
    assert close(wgmma("bf16", 16, image, *PLAIN, "1, 1, 1, 0", a=fragment, c=fc)["d"], spread(a @ b.T + c))
    assert close(wgmma("bf16", 16, image, *PLAIN, "0, 1, 1, 0", a=fragment, c=fc)["d"], spread(a @ b.T))
    assert close(wgmma("bf16", 16, image, *PLAIN, "1, -1, 1, 0", a=fragment, c=fc)["d"], spread(c - a @ b.T))


@pytest.mark.parametrize("asynchronous", ["late", "early", "random"])
def test_what_is_right_has_no_faults(asynchronous: str) -> None:
    image, a, b = simple()
    got = wgmma("bf16", 16, image, *PLAIN, "1, 1, 1, 0, 0", asynchronous=asynchronous, schedule="random", seed=3)
    assert not got.faults and close(got["d"], spread(a @ b.T))


def faulty(edit: Any, **options: Any) -> set[str]:
    """The kinds of faults of a program with something changed."""
    image, _, _ = simple()
    product = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {registers('d', 8)}, %da, %db, 1, 1, 1, 0, 0;"
    lines = [
        FILL,
        ADDRESS.format(a=PLAIN[0], b=PLAIN[1]),
        *(f"mov.b32 %d{i}, 0;" for i in range(8)),
        "wgmma.fence.sync.aligned;",
        product,
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
    ]
    body = "\n".join(edit(lines))
    try:
        got = run(
            body,
            {},
            {"d": (8, np.float32)},
            arrays={"image": image},
            registers=DECLARE,
            warps=4,
            shared=SIZE,
            **options,
        )
    except Fault as fault:
        return set(fault.__notes__)
    return got.kinds


def without(text: str) -> Any:
    return lambda lines: [line.replace(text, "") if text in line else line for line in lines]


def test_nothing_is_found_where_nothing_is_changed() -> None:
    assert faulty(lambda lines: lines) == set()


@pytest.mark.parametrize("asynchronous", ["late", "early"])
def test_missing_fences_commits_and_waits(asynchronous: str) -> None:
    options = {"asynchronous": asynchronous}
    assert "fence" in faulty(without("wgmma.fence.sync.aligned;"), **options)
    assert "fence" in faulty(without("wgmma.commit_group.sync.aligned;"), **options)
    assert {"registers", "unfinished"} <= faulty(without("wgmma.wait_group.sync.aligned 0;"), **options)
    assert "registers" in faulty(lambda lines: [*lines[:-1], lines[-1].replace(" 0", " 1")], **options)
    assert "proxy" in faulty(without("fence.proxy.async.shared::cta;"), **options)
    assert "race" in faulty(without("bar.sync 0;"), **options)


def test_registers_in_flight_are_left_alone() -> None:
    late = "wgmma.wait_group.sync.aligned 0;"
    assert "registers" in faulty(lambda x: [*x[:-1], "add.f32 %d3, %d3, %d3;", late])
    assert "registers" in faulty(lambda x: [*x[:-1], "mov.b32 %d3, 0;", late])
    assert "fence" in faulty(lambda x: [*x[:-4], x[-4], "cvt.rn.f32.s32 %d2, %n;", *x[-3:]])
    assert faulty(lambda x: [*x, "add.f32 %d3, %d3, %d3;"]) == set()
    assert faulty(lambda x: [*x[:-2], x[-3], *x[-2:]]) == set()  # a second product accumulates
    assert faulty(lambda x: [*x[:-1], "mov.b32 %w0, %d3;", late, "add.f32 %d3, %w0, %w0;"]) == set()  # renamed


def test_a_in_registers_is_left_alone() -> None:
    image, _, _ = simple()
    product = (
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {registers('d', 8)}, {registers('w', 4)}, "
        "%db, 0, 1, 1, 0;"
    )
    for change, kinds in (("add.u32 %w1, %w1, 1;", {"registers"}), ("add.u32 %n, %w1, 1;", set())):
        body = (
            FILL
            + ADDRESS.format(a=PLAIN[0], b=PLAIN[1])
            + "wgmma.fence.sync.aligned;"
            + product
            + "wgmma.commit_group.sync.aligned;"
            + change
            + "wgmma.wait_group.sync.aligned 0;"
        )
        got = run(body, {}, {"d": (8, np.float32)}, arrays={"image": image}, registers=DECLARE, warps=4, shared=SIZE)
        assert got.kinds == kinds


def test_shared_memory_that_a_product_reads_is_left_alone() -> None:
    late = "wgmma.wait_group.sync.aligned 0;"
    store = "add.u32 %at, %base, 16384; @%first st.shared.b32 [%at], %n;"
    for asynchronous in ("late", "early"):
        assert "race" in faulty(lambda x: [*x[:-1], "bar.sync 0;", store, late], asynchronous=asynchronous)
        assert faulty(lambda x: [*x, "bar.sync 0;", store], asynchronous=asynchronous) == set()


def test_descriptors_that_are_wrong() -> None:
    def change(a: str, b: str) -> Any:
        return lambda x: [line.replace(PLAIN[0], a).replace(PLAIN[1], b) for line in x]

    assert faulty(change(PLAIN[0], descriptor(SIZE - 128, 16, 128, 256))) == {"bounds"}
    assert faulty(change(f"{int(PLAIN[0], 16) | 1 << 49:#x}", PLAIN[1])) == {"descriptor"}
    assert faulty(lambda x: [*x[:2], "cvt.u64.u32 %wide, %thread; add.u64 %db, %db, %wide;", *x[2:]]) == {"lanes"}
