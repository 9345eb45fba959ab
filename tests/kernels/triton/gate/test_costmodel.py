"""The counts that the cost model lives on are those of today's machine code, and they add up."""

from __future__ import annotations

import re

import pytest
import triton

from vidaccel.kernels.triton import costmodel
from vidaccel.kernels.triton.configs import Config, Entry, choose
from vidaccel.kernels.triton.costmodel import step_of
from vidaccel.kernels.triton.counting import compile_forward, count_step, multiplications

MAIN = [(80, "native16"), (89, "int8-fp8"), (90, "native16"), (90, "fp8-fp8"), (100, "native16"), (120, "int8")]


@pytest.mark.triton("3.6")
@pytest.mark.parametrize(("arch", "kind", "tail"), [*((*main, False) for main in MAIN), (90, "native16", True)])
def test_committed_counts_are_those_of_the_kernel(arch: int, kind: str, tail: bool) -> None:
    config = choose(arch, kind, 128, 128)
    code = compile_forward(arch, kind, 128, config, bias=int(tail))
    now = count_step(Entry(arch, kind, 128, config, "gate"), code).to_dict()
    stored = step_of(arch, kind, 128, config, tail=tail).counts
    assert now["products"] == stored["products"]
    for name in ("exponentials", "arithmetic", "memory", "issued"):
        assert now[name] == pytest.approx(stored[name], rel=0.1, abs=16), "run python -m benchmarks.gate_counts"


@pytest.mark.parametrize(("arch", "warps"), [(80, 8), (90, 8), (120, 8)])
def test_a_step_does_the_arithmetic_it_must(arch: int, warps: int) -> None:
    """Each score takes one exponential and each fading one more; the products are those of the definition."""
    config = choose(arch, "native16", 128, 128)
    counts = count_step(Entry(arch, "native16", 128, config, "gate"), compile_forward(arch, "native16", 128, config))
    m, n, d = config.block_m, config.block_n, 128
    assert counts.products == {"bf16": 2.0 * m * n * d} and counts.warps == warps
    # rows fade in every thread that holds a part of them: a row of 128 or 64 columns is held by four
    assert m * n / 32 <= counts.exponentials <= (m * n + 4 * m) / 32 + 8
    assert counts.issued > counts.arithmetic + counts.exponentials
    # two fused multiply-adds or comparisons a score at least: the scale with the maximum, and the maximum itself
    assert counts.arithmetic >= 2 * m * n / 32


def test_mnemonics() -> None:
    assert multiplications("HMMA.16816.F32.BF16") == ("bf16", 16 * 8 * 16)
    assert multiplications("HMMA.1688.F32.TF32") == ("tf32", 16 * 8 * 8)
    assert multiplications("IMMA.16832.S8.S8.SAT") == ("int8", 16 * 8 * 32)
    assert multiplications("QGMMA.64x128x32.F32.E4M3.E4M3") == ("fp8", 64 * 128 * 32)
    assert multiplications("HGMMA.64x64x8.F32.TF32") == ("tf32", 64 * 64 * 8)
    assert multiplications("UTCHMMA") is None and multiplications("FFMA") is None


def test_every_product_of_the_gate_is_known() -> None:
    """A mnemonic of a warp's product that the counter could not read would be counted as nothing."""
    code = compile_forward(90, "int8", 64, Config(64, 64, 4, 2))
    products = [name for name in code.main_loop if re.match(r"[HIQ]G?MMA", name)]
    assert products and all(multiplications(name) for name in products)
    assert triton.__version__ and costmodel.hardware(90).products
