"""The gate itself: what it reads out of machine code, and that it says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from vidaccel.errors import KernelError
from vidaccel.kernels.triton.coordinates import TileCopy, tile_copies
from vidaccel.kernels.triton.disassembly import argument_stores, loops_of, sass
from vidaccel.kernels.triton.gate import MachineCode, compile_for, problems


@triton.jit
def two_products(q, k, v, out, steps, N: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """out = sum over steps of (Q K_i^T) V_i, the second product in V's format; no softmax."""
    rows, channels = tl.arange(0, 128), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * D + channels)
    keys = tl.make_tensor_descriptor(k, [steps * N, D], [D, 1], [N, D])
    if TRANSPOSED:
        values = tl.make_tensor_descriptor(v, [D, steps * N], [steps * N, 1], [D, N])
    else:
        values = tl.make_tensor_descriptor(v, [steps * N, D], [D, 1], [N, D])
    total = tl.zeros([128, D], tl.float32)
    for i in range(steps):
        weights = tl.dot(queries, keys.load([i * N, 0]).T, out_dtype=tl.float32).to(v.dtype.element_ty)
        if TRANSPOSED:
            total += tl.dot(weights, values.load([0, i * N]).T)
        else:
            total += tl.dot(weights, values.load([i * N, 0]))
    tl.store(out + rows[:, None] * D + channels, total)


def compiled(arch: int, *, values: torch.dtype, transposed: bool, warps: int = 8) -> MachineCode:
    """:func:`two_products` with bf16 keys."""

    def warmup() -> Any:
        q, k = (torch.empty(256, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
        v = torch.empty(256, 128, dtype=values, device="meta")
        out = torch.empty(128, 128, device="meta")
        return two_products.warmup(q, k, v, out, 2, 64, 128, transposed, num_warps=warps, num_stages=2, grid=(1,))

    return compile_for(arch, warmup)


@pytest.fixture(scope="module")
def hopper() -> MachineCode:
    return compiled(90, values=torch.float8_e4m3fn, transposed=True)


@pytest.mark.representative
def test_it_reads_a_clean_kernel(hopper: MachineCode) -> None:
    assert problems(hopper, products=["bf16", "fp8"], tma=True) == []
    assert hopper.spill_bytes == hopper.stack == hopper.local_accesses == 0
    # 128 rows are two warpgroups; each multiplies 64 rows by 16 channels (bf16) or 32 keys (fp8) in an instruction
    assert hopper.count("HGMMA.64x64x16", hopper.main_loop) == 128 // 16
    assert hopper.count("QGMMA.64x128x32", hopper.main_loop) == 64 // 32
    assert hopper.num_warps == 8


@pytest.mark.representative
def test_values_that_are_not_transposed_are_found() -> None:
    """fp8 products take V with its keys contiguous; otherwise every step turns the tile over in shared memory."""
    code = compiled(90, values=torch.float8_e4m3fn, transposed=False)
    assert any("rearranged" in text for text in problems(code, products=["bf16", "fp8"]))


@pytest.mark.parametrize(("arch", "cores"), [(80, "HMMA"), (100, "UTCHMMA"), (120, "HMMA")])
def test_each_architecture_has_its_own_products(arch: int, cores: str) -> None:
    code = compiled(arch, values=torch.bfloat16, transposed=False)
    assert code.count(cores) and problems(code, products=["bf16"]) == []
    assert any("no int8 product" in text for text in problems(code, products=["int8"]))


def test_every_finding_has_its_sentence(hopper: MachineCode) -> None:
    def said(**changes: Any) -> str:
        (text,) = problems(replace(hopper, **changes))
        return text

    assert "24 bytes of registers are spilled" in said(spill_bytes=24)
    assert "2 instructions access local memory" in said(instructions={**hopper.instructions, "LDL.64": 2})
    assert "8 bytes of stack" in said(stack=8)
    assert "serialised: a wait" in said(serialised="a wait")
    assert "above the architecture's 232448" in said(shared_memory=232_449)
    assert "generation before" in said(instructions={**hopper.instructions, "HMMA.16816.F32.BF16": 1})
    (text,) = problems(replace(hopper, instructions={}), tma=True)
    assert "no tile is loaded by the copy engine" in text
    (text,) = problems(hopper, warp_specialised=True)
    assert "warp specialisation was asked for" in text
    with pytest.raises(KernelError, match="no operand format 'fp4'; valid are"):
        problems(hopper, products=["fp4"])


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(KernelError, match="does not know architecture 70; known are"):
        compile_for(70, lambda: None)


def test_what_cannot_be_compiled_is_one_sentence() -> None:
    def warmup() -> Any:
        x = torch.empty(16, device="meta")
        return two_products.warmup(x, x, x, x, 2, 48, 128, True, grid=(1,))  # 48 is no power of two

    with pytest.raises(KernelError, match=r"Triton .* cannot compile for 90: ") as caught:
        compile_for(90, warmup)
    assert "\n" not in str(caught.value)


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
.L_x_1:
        /*0020*/                   FADD R3, R3, R4 ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
        /*0050*/                   STL [R1], R5 ;
        /*0060*/                   CALL.ABS.NOINC R6 ;
        /*0070*/                   STL [R1+0x4], R5 ;
        /*0080*/                   EXIT ;
"""


def test_loops_are_found_by_what_reaches_what() -> None:
    loops, main = loops_of(sass(SASS))
    assert [dict(loop) for loop in loops] == [
        {"HMMA.16816.F32.BF16": 1, "FADD": 1, "BRA": 2},
        {"FADD": 1, "BRA": 1},
    ]
    assert main == loops[0], "the loop with the products, though another is inside it"


def test_arguments_of_a_call_are_not_spills() -> None:
    assert argument_stores(sass(SASS)) == 1, "the store after the call is one"


@pytest.mark.representative
def test_where_tile_copies_begin(hopper: MachineCode) -> None:
    """Constants by their value, in each partition its own; everything else by its name."""
    assert {copy.tile for copy in hopper.copies} == {"keys", "values"} and not any(copy.store for copy in hopper.copies)
    assert all(copy.at[1 if copy.tile == "keys" else 0] == 0 for copy in hopper.copies)
    text = """
      %c0_i32 = arith.constant {async_task_id = array<i32: 0>} 0 : i32
      ttng.async_tma_copy_global_to_local %q_tile_17[%first, %c0_i32] %66, %65, %true
      %c0_i32 = arith.constant 64 : i32
      ttng.async_tma_copy_local_to_global %out_tile[%c0_i32, %c0_i32] %70
    """
    assert tile_copies(text) == (TileCopy("q_tile", False, ("%first", 0)), TileCopy("out_tile", True, (64, 64)))


@pytest.mark.representative
def test_a_tile_that_is_not_whole(hopper: MachineCode) -> None:
    copies = (TileCopy("keys", False, ("%start", 64)), TileCopy("keys", False, ("%start", "%start")))
    moved = replace(hopper, warp_specialised=True, copies=copies)
    assert problems(moved, whole_rows=["keys", "other"]) == [
        "keys is loaded at [%start, %start]: row and column are one value",
        "keys is loaded at [%start, 64], which is not column 0",
        "keys is loaded at [%start, %start], which is not column 0",
        "the copy engine copies no other",
    ]
    # without specialised warps nothing moves a coordinate
    assert problems(replace(moved, warp_specialised=False)) == []
