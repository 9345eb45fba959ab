"""The preparation kernels compiled for every architecture, at the shapes of a long video."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidaccel.kernels.quantise import ROWS
from vidaccel.kernels.triton.gate import MachineCode, compile_for, problems
from vidaccel.kernels.triton.means import block_reduction
from vidaccel.kernels.triton.quantise import quantise_rows, quantise_values
from vidaccel.kernels.triton.rope import warps_for
from vidaccel.kernels.triton.rotation import rotate_rows

ARCHES = [80, 86, 89, 90, 100, 120]
REPRESENTATIVE = pytest.mark.representative
#: One sequence of Wan's length: 75,600 tokens in 128-token blocks, 40 heads.
TOKENS, HEADS, BLOCKS, D = 75_600, 40, 591, 128
STRIDES = (TOKENS * HEADS * D, HEADS * D, D, 1)


def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


ROWS_16 = tensor(torch.bfloat16, 1, TOKENS, HEADS, D)
CHANNELS = tensor(torch.float32, 1, HEADS, D)
PER_BLOCK = tensor(torch.float32, 1, HEADS, BLOCKS, D)
OFFSETS = tensor(torch.int32, BLOCKS + 1)


def reduction(arch: int, variant: str) -> MachineCode:
    def warmup() -> Any:
        return block_reduction.warmup(
            *(ROWS_16, ROWS_16, PER_BLOCK, PER_BLOCK, PER_BLOCK, PER_BLOCK, PER_BLOCK, OFFSETS),
            *STRIDES,
            *STRIDES[:3],
            *(HEADS * BLOCKS * D, D, BLOCKS * D),
            *(HEADS, BLOCKS),
            D=D,
            BLOCK_D=D,
            ROWS=32,
            RANGE=variant == "ranges",
            SIMILARITY=variant == "statistics",
            COPY=variant == "copy",
            num_warps=4,
            grid=(1,),
        )

    return compile_for(arch, warmup)


def rows(arch: int, *, fp8: bool, granularity: str) -> MachineCode:
    def warmup() -> Any:
        return quantise_rows.warmup(
            *(ROWS_16, CHANNELS, CHANNELS),
            tensor(torch.float8_e4m3fn if fp8 else torch.int8, 1, TOKENS, HEADS, D),
            *(tensor(torch.float32, 1, HEADS, TOKENS), PER_BLOCK, OFFSETS),
            *STRIDES,
            *(D, 0),
            *STRIDES[:3],
            *(TOKENS, HEADS, BLOCKS),
            D=D,
            BLOCK_D=D,
            ROWS=ROWS,
            FP8=fp8,
            SMOOTH=True,
            GRANULARITY=granularity,
            MEANS=True,
            num_warps=4,
            grid=(1,),
        )

    return compile_for(arch, warmup)


def values(arch: int) -> MachineCode:
    columns = BLOCKS * 128

    def warmup() -> Any:
        return quantise_values.warmup(
            *(ROWS_16, CHANNELS, CHANNELS, tensor(torch.float8_e4m3fn, 1, HEADS, D, columns), OFFSETS, OFFSETS),
            *STRIDES,
            *(columns, HEADS),
            D=D,
            BLOCK_D=D,
            COLUMNS=64,
            SMOOTH=True,
            num_warps=4,
            grid=(1,),
        )

    return compile_for(arch, warmup)


def rotation(
    arch: int,
    *,
    norm: str,
    halves: bool = False,
    per_head: bool = False,
    rows: int = 16,
    rounding: str = "no",
    pairs: bool = False,
) -> MachineCode:
    table = tensor(torch.float32, TOKENS, D)
    order = tensor(torch.int32, 1, HEADS, TOKENS)
    kind = {"no": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[rounding]
    weight = tensor(torch.bfloat16, HEADS * D)

    def warmup() -> Any:
        return rotate_rows.warmup(
            *(ROWS_16, tensor(kind, 1, TOKENS, HEADS, D), CHANNELS, order, table, table, weight, PER_BLOCK),
            *(OFFSETS, OFFSETS),
            *STRIDES,
            *STRIDES[:3],
            *(HEADS * TOKENS, TOKENS, D, TOKENS, HEADS, BLOCKS, 1e-6),
            D=D,
            HALF=D // 2,
            ROWS=rows,
            ORDER=True,
            ORDER_PER_HEAD=per_head,
            ROTATE=True,
            HALVES=halves,
            SOURCE_TABLES=False,
            PAIR_TABLES=pairs,
            NORM=norm,
            MEANS=True,
            ROUND=rounding,
            num_warps=warps_for(rows),
            grid=(1,),
        )

    return compile_for(arch, warmup)


def findings(code: MachineCode) -> list[str]:
    """What is wrong, without what is wrong only in a loop of products: here scales and transposed tiles go through
    shared memory on purpose."""
    return [text for text in problems(code) if "stores to shared memory in the main loop" not in text]


def wide(code: MachineCode) -> int:
    """Loads of 16 bytes: what a copy at full speed takes."""
    return code.count(r"LDG\.E\.128")


@pytest.mark.parametrize("variant", ["ranges", "statistics", "copy"])
@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=REPRESENTATIVE)])
def test_block_reduction(arch: int, variant: str) -> None:
    code = reduction(arch, variant)
    assert findings(code) == []
    assert wide(code)


@pytest.mark.parametrize(
    ("arch", "fp8", "granularity"),
    [
        *((arch, arch >= 89, "block") for arch in ARCHES),
        (90, False, "block"),
        pytest.param(90, False, "rows32", marks=REPRESENTATIVE),
    ],
)
def test_quantise_rows(arch: int, fp8: bool, granularity: str) -> None:
    code = rows(arch, fp8=fp8, granularity=granularity)
    assert findings(code) == []
    assert wide(code)


@pytest.mark.parametrize("arch", [89, pytest.param(90, marks=REPRESENTATIVE), 100, 120])
def test_quantise_values(arch: int) -> None:
    code = values(arch)
    assert findings(code) == []
    assert wide(code)
    # columns of a block begin at multiples of 16, so the transposed bytes leave in runs as well
    assert code.count(r"STG\.E\.(64|128)") and not code.count(r"STG\.E\.U8")


def scalar_accesses(code: MachineCode) -> int:
    """Two bytes at a time; the norm's weight may be read so, rows of x may not."""
    return max(0, code.count(r"LDG\.E\.U16") - 1) + code.count(r"STG\.E\.U(8|16)")


@pytest.mark.parametrize("arch", [pytest.param(a, marks=REPRESENTATIVE) if a == 90 else a for a in ARCHES])
def test_rotate_rows(arch: int) -> None:
    code = rotation(arch, norm="row")
    assert findings(code) == []
    # pairs stay in registers: 16 bytes in and out
    assert wide(code) and code.count(r"STG\.E\.128") and not scalar_accesses(code)


@pytest.mark.parametrize("per_head", [False, pytest.param(True, marks=REPRESENTATIVE)])
def test_rotate_halves(per_head: bool) -> None:
    code = rotation(90, norm="head", halves=True, per_head=per_head)
    assert findings(code) == []
    assert wide(code) and code.count(r"STG\.E\.128") and not scalar_accesses(code)


@pytest.mark.parametrize(
    ("arch", "rows", "rounding", "pairs"),
    [
        (80, 128, "int8", True),
        (86, 64, "int8", False),
        (89, 128, "fp8", True),
        pytest.param(90, 128, "fp8", True, marks=REPRESENTATIVE),
        (90, 64, "fp8", False),
        (90, 32, "int8", False),
        (100, 128, "fp8", True),
        (120, 128, "fp8", True),
    ],
)
def test_rotate_and_round(arch: int, rows: int, rounding: str, pairs: bool) -> None:
    code = rotation(arch, norm="row", rows=rows, rounding=rounding, pairs=pairs)
    assert findings(code) == []
    assert wide(code) and not scalar_accesses(code)
