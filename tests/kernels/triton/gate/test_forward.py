"""Every shipped launch configuration compiled for its architecture, and its machine code read.

With the pooled tail and the LSE on: the largest variant of the kernel, so the others have room too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton

from vidaccel.kernels.quantise import ROWS
from vidaccel.kernels.triton.configs import Config, Entry, choose, for_skipping, table
from vidaccel.kernels.triton.forward import block_sparse_forward
from vidaccel.kernels.triton.gate import MachineCode, compile_for, problems

#: Operand formats of QK^T and of PV.
PRODUCTS = {
    "native16": ("bf16", "bf16"),
    "native32": ("tf32", "tf32"),
    "int8": ("int8", "bf16"),
    "int8-fp8": ("int8", "fp8"),
    "fp8-fp8": ("fp8", "fp8"),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
#: Both in sequences of Wan's length: 75,600 tokens in 128-token blocks, 12 heads.
TOKENS, HEADS, BLOCKS = 75_600, 12, 591


def compiled(
    arch: int | str, kind: str, head_dim: int, config: Config, *, bias: int = 1, skip: bool = False
) -> MachineCode:
    """The kernel's machine code for the shapes of a long video."""
    qk, pv = (DTYPES[name] for name in PRODUCTS[kind])
    out = torch.float32 if kind == "native32" else torch.bfloat16
    fp8_values = pv == torch.float8_e4m3fn

    def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def warmup() -> Any:
        rows = (1, TOKENS, HEADS, head_dim)
        row, head = HEADS * head_dim, head_dim
        v = tensor(pv, 1, HEADS, head_dim, TOKENS) if fp8_values else tensor(pv, *rows)
        scales = tensor(torch.float32, 1, HEADS, TOKENS)
        channels = tensor(torch.float32, 1, HEADS, head_dim)
        table_ = tensor(torch.int32, BLOCKS)
        return block_sparse_forward.warmup(
            *(tensor(qk, *rows), tensor(qk, *rows), v, tensor(out, *rows), scales),
            *(scales, scales, channels, channels),
            *(table_,) * 6,
            *(tensor(torch.int32, 1, HEADS, BLOCKS), tensor(torch.int32, 1, HEADS, BLOCKS, BLOCKS)),
            *(tensor(torch.int32, HEADS * BLOCKS), tensor(torch.float32, HEADS * BLOCKS + 1, 640)),
            *(tensor(torch.float32, HEADS), tensor(torch.int32, HEADS)),
            *(TOKENS * row, row, head) * 2,
            *((TOKENS * row, TOKENS, head * TOKENS) if fp8_values else (TOKENS * row, row, head)),
            *(TOKENS * row, row, head),
            *(HEADS * BLOCKS, BLOCKS),
            *(TOKENS, TOKENS, TOKENS, HEADS, BLOCKS, BLOCKS, BLOCKS, BLOCKS, HEADS * BLOCKS + 1, 640, 0.1),
            D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            QK_8BIT=not kind.startswith("native"),
            PV_FP8=fp8_values,
            ROWS_PER_SCALE=ROWS if kind == "int8-fp8" else 128,
            V_MEAN=fp8_values,
            RAGGED=True,
            BIAS=bias,
            SKIP=skip,
            LSE=True,
            FLOAT32_PRODUCT="tf32x3" if isinstance(arch, int) else "ieee",
            WARP_SPECIALIZE=config.warp_specialize,
            num_warps=config.warps,
            num_stages=config.stages,
            grid=(1,),
        )

    return compile_for(arch, warmup)


def findings(code: MachineCode, kind: str, config: Config) -> list[str]:
    """What is wrong with it; nothing where Triton knows no better instruction for int8."""
    products = [name for name in dict.fromkeys(PRODUCTS[kind]) if (code.arch, name) != (100, "int8")]
    found = problems(code, products=products, warp_specialised=config.warp_specialize)
    if code.arch == 100 and "int8" in PRODUCTS[kind]:
        found = [text for text in found if "generation before" not in text]
    return found


def entry_id(entry: Entry) -> str:
    return f"{entry.arch}-{entry.kind}-{entry.head_dim}-{entry.config.block_m}x{entry.config.block_n}"


@pytest.mark.parametrize("entry", table(), ids=entry_id)
def test_shipped_configuration(entry: Entry) -> None:
    if not triton.__version__.startswith("3.6") and (entry.head_dim != 128 or entry.config.block_m != 128):
        pytest.skip("3.6 is the verdict on all configurations; later versions check the main ones")
    code = compiled(entry.arch, entry.kind, entry.head_dim, entry.config)
    assert findings(code, entry.kind, entry.config) == []


HOPPER = [entry for entry in table() if entry.arch == 90 and entry.config.warp_specialize and entry.head_dim == 128]


@pytest.mark.parametrize("entry", HOPPER, ids=entry_id)
def test_q_smoothing_on_hopper(entry: Entry) -> None:
    """Every key with a bias keeps the warps specialised."""
    assert findings(compiled(90, entry.kind, 128, entry.config, bias=2), entry.kind, entry.config) == []


# the largest tiles at the most channels that may skip
SKIPPING = [entry for entry in table() if entry.arch != 100 and entry.head_dim == 128 and entry.config.block_m == 128]


@pytest.mark.triton("3.6")
@pytest.mark.parametrize("entry", SKIPPING, ids=entry_id)
def test_skipping(entry: Entry) -> None:
    """A branch in the loop rules out specialised warps, so skipping does without."""
    plain = for_skipping(entry.config)
    assert findings(compiled(entry.arch, entry.kind, 128, plain, skip=True), entry.kind, plain) == []


def test_fp8_products_start_from_zero() -> None:
    """Each key piece's product has an accumulator of its own, added in float32 (SageAttention2's two levels)."""
    config = choose(90, "fp8-fp8", 128, 128)
    fp8, native = compiled(90, "fp8-fp8", 128, config), compiled(90, "native16", 128, config)
    # the second level is one addition for each accumulated value of a thread, fused with the rescaling
    assert fp8.count("FFMA") >= native.count("FFMA") + 128


def test_the_bf16_kernel_compiles_for_amd() -> None:
    code = compiled("gfx942", "native16", 128, Config(128, 64, 4, 1))
    assert problems(code, products=["bf16"]) == []


# -- broken on purpose: the gate has to say so -----------------------------------------------------------------------


def wrong(config: Config, text: str, kind: str = "native16", head_dim: int = 128) -> None:
    assert any(re.search(text, found) for found in findings(compiled(90, kind, head_dim, config), kind, config))


def test_too_few_warps_spill() -> None:
    wrong(Config(128, 128, 4, 2), "spilled")


def test_too_large_a_tile_does_not_fit_into_shared_memory() -> None:
    wrong(Config(128, 128, 8, 2), "shared memory are above", head_dim=256)


def test_eight_warps_are_not_specialised() -> None:
    wrong(replace(choose(90, "native16", 128, 128), warps=8), "warp specialisation was asked for and is not there")


def test_sixteen_rows_miss_the_warpgroup_products() -> None:
    wrong(Config(16, 64, 4, 2), "no bf16 product on the tensor cores")
