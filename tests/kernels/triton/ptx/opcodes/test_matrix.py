"""Matrices in registers: the fragments of PTX ISA 9.7.14.5, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.triton.ptx.opcodes.programs import run

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(1)
Array = np.ndarray[Any, Any]


def matrix(kind: str, *shape: int) -> tuple[Array, Array]:
    """Random numbers of a format: their bits, and their values."""
    if kind in ("s8", "u8"):
        v = RANDOM.integers(-128 if kind == "s8" else 0, 128 if kind == "s8" else 256, shape)
        return v.astype(np.int8 if kind == "s8" else np.uint8).view(np.uint8), v.astype(np.float64)
    if kind == "tf32":
        bits = RANDOM.normal(size=shape).astype(np.float32).view(np.uint32)
        return bits, (bits & 0xFFFFE000).view(np.float32).astype(np.float64)  # the rest of the word is ignored
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    t = torch.from_numpy(RANDOM.normal(size=shape)).to(dtype)
    unsigned = torch.int16 if t.itemsize == 2 else torch.uint8
    return t.view(unsigned).numpy().view(f"u{t.itemsize}"), t.double().numpy()


def a_fragment(bits: Array) -> Array:
    """A ``[16, k]``: register i of lane l holds neighbours in row l / 4 (+ 8 for odd i), from column
    (l % 4) * (numbers of a word), + half of k for i >= 2."""
    k, item = bits.shape[1], bits.itemsize
    word = 4 // item
    registers = k * item // 8
    out = np.zeros((registers, 32, word), bits.dtype)
    for i in range(registers):
        for lane in range(32):
            row = lane // 4 + (8 if i % 2 else 0)
            column = lane % 4 * word + (k // 2 if i >= 2 else 0)
            out[i, lane] = bits[row, column : column + word]
    return out.reshape(registers, 32 * word).view(np.uint32)


def b_fragment(bits: Array) -> Array:
    """B ``[k, 8]``: column l / 4, rows from (l % 4) * (numbers of a word), + half of k for the second register."""
    k, item = bits.shape[0], bits.itemsize
    word = 4 // item
    registers = k * item // 16
    out = np.zeros((registers, 32, word), bits.dtype)
    for i in range(registers):
        for lane in range(32):
            row = lane % 4 * word + (k // 2 if i == 1 else 0)
            out[i, lane] = bits[row : row + word, lane // 4]
    return out.reshape(registers, 32 * word).view(np.uint32)


def c_fragment(values: Array) -> Array:
    """C, D ``[16, n]``: registers 0 and 1 row l / 4, columns 2 (l % 4) and the next; 2 and 3 eight rows below; then the
    next eight columns."""
    out = np.zeros((values.shape[1] // 2, 32), values.dtype)
    for i in range(len(out)):
        for lane in range(32):
            out[i, lane] = values[lane // 4 + (8 if i % 4 >= 2 else 0), i // 4 * 8 + 2 * (lane % 4) + i % 2]
    return out


def registers(name: str, n: int) -> str:
    return "{" + ", ".join(f"%{name}{i}" for i in range(n)) + "}"


FORMATS = [
    ("f16", "k8", 8),
    ("bf16", "k8", 8),
    ("f16", "k16", 16),
    ("bf16", "k16", 16),
    ("tf32", "k4", 4),
    ("tf32", "k8", 8),
    ("s8", "k16", 16),
    ("s8", "k32", 32),
    ("u8", "k32", 32),
    ("e4m3", "k32", 32),
    ("e5m2", "k32", 32),
]


@pytest.mark.parametrize(("kind", "shape", "k"), FORMATS)
def test_products(kind: str, shape: str, k: int) -> None:
    (abits, a), (bbits, b) = matrix(kind, 16, k), matrix(kind, k, 8)
    whole = kind in ("s8", "u8")
    c = (
        RANDOM.integers(-1000, 1000, (16, 8)).astype(np.int32)
        if whole
        else RANDOM.normal(size=(16, 8)).astype(np.float32)
    )
    fa, fb, fc = a_fragment(abits), b_fragment(bbits), c_fragment(c)
    d = "s32" if whole else "f32"
    body = (
        f"mma.sync.aligned.m16n8{shape}.row.col.{d}.{kind}.{kind}.{d} {registers('d', 4)}, "
        f"{registers('a', len(fa))}, {registers('b', len(fb))}, {registers('c', 4)};"
    )
    target = "sm_89" if kind[0] == "e" else "sm_80"
    got = run(body, {"a": fa, "b": fb, "c": fc}, {"d": (4, c.dtype)}, target=target)["d"]
    wanted = c_fragment(a @ b + c)
    if whole:
        assert (got == wanted).all()
    else:
        assert np.abs(got - wanted).max() <= 2.0**-22 * np.abs(wanted).max()


def test_accumulators_of_16_bits() -> None:
    (abits, a), (bbits, b) = matrix("f16", 16, 16), matrix("f16", 16, 8)
    c = RANDOM.normal(size=(16, 8)).astype(np.float16)
    fc = c_fragment(c).reshape(2, 2, 32).transpose(0, 2, 1).copy().view(np.uint32).reshape(2, 32)
    body = (
        f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {registers('d', 2)}, {registers('a', 4)}, "
        f"{registers('b', 2)}, {registers('c', 2)};"
    )
    got = run(body, {"a": a_fragment(abits), "b": b_fragment(bbits), "c": fc}, {"d": (2, np.uint32)})["d"]
    halves = got.reshape(2, 32, 1).view(np.float16).transpose(0, 2, 1).reshape(4, 32)
    assert (halves == c_fragment((a @ b + c).astype(np.float16))).all()


def test_integers_wrap_around_or_saturate() -> None:
    a, b = np.full((16, 32), 127, np.int8).view(np.uint8), np.full((32, 8), 127, np.int8).view(np.uint8)
    c = np.full((16, 8), (1 << 31) - 1000, np.int32)
    for word, wanted in (("", 127 * 127 * 32 + (1 << 31) - 1000 - (1 << 32)), (".satfinite", (1 << 31) - 1)):
        body = (
            f"mma.sync.aligned.m16n8k32.row.col{word}.s32.s8.s8.s32 {registers('d', 4)}, "
            f"{registers('a', 4)}, {registers('b', 2)}, {registers('c', 4)};"
        )
        got = run(body, {"a": a_fragment(a), "b": b_fragment(b), "c": c_fragment(c)}, {"d": (4, np.int32)})["d"]
        assert (got == wanted).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrices_from_shared_memory(n: int, trans: str) -> None:
    tiles = RANDOM.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    rows = tiles.reshape(32, 8)
    order = RANDOM.permutation(32).astype(np.uint32)  # row r of all lies at place order[r]
    words = rows.view(np.uint32).T.copy()
    body = f"""
    mov.u32 %base, smem; shl.b32 %at, %o, 4; add.u32 %at, %at, %base;
    st.shared.v4.b32 [%at], {registers("w", 4)}; bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {registers("d", n)}, [%at];
    """
    got = run(body, {"w": words, "o": order}, {"d": (n, np.uint32)}, registers=".reg .b32 %base, %at;", shared=512)["d"]
    for i in range(n):
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            pair = [tiles[i, row, column], tiles[i, row, column + 1]]
            if trans:
                pair = [tiles[i, column, row], tiles[i, column + 1, row]]
            assert got[i, lane] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrices_to_shared_memory(n: int, trans: str) -> None:
    words = RANDOM.integers(0, 1 << 32, (n, 32), dtype=np.uint32)
    body = f"""
    mov.u32 %base, smem; shl.b32 %at, %thread, 4; add.u32 %at, %at, %base;
    mov.u32 %z, 0; st.shared.v4.b32 [%at], {{%z, %z, %z, %z}}; bar.warp.sync 0xffffffff;
    stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%at], {registers("a", n)};
    bar.warp.sync 0xffffffff; ld.shared.v4.b32 {registers("d", 4)}, [%at];
    """
    got = run(body, {"a": words}, {"d": (4, np.uint32)}, registers=".reg .b32 %base, %at, %z;", shared=512)["d"]
    tiles = got.T.copy().view(np.uint16).reshape(4, 8, 8)
    for i in range(4):
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            pair = [tiles[i, column, row], tiles[i, column + 1, row]] if trans else tiles[i, row, column : column + 2]
            assert int(pair[0]) | int(pair[1]) << 16 == (words[i, lane] if i < n else 0)


def test_transposing_in_registers() -> None:
    tile = RANDOM.integers(0, 1 << 16, (8, 8)).astype(np.uint16)
    words = tile.reshape(32, 2).view(np.uint32).ravel()
    got = run("movmatrix.sync.aligned.m8n8.trans.b16 %d, %a;", {"a": words}, {"d": np.uint32})["d"]
    assert (got == tile.T.copy().reshape(32, 2).view(np.uint32).ravel()).all()
