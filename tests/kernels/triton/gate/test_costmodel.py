"""The counts that the cost model lives on are those of today's machine code, and they add up."""

from __future__ import annotations

import re

import pytest
import triton

from tests.kernels.triton.gate.forward_code import check_counts, compiled
from vidaccel.kernels.triton import costmodel
from vidaccel.kernels.triton.configs import Config, Entry, choose
from vidaccel.kernels.triton.counting import count_step, multiplications

MAIN = [(80, "native16"), (89, "int8-fp8"), (90, "native16"), (90, "fp8-fp8"), (120, "native16"), (120, "int8")]


@pytest.mark.triton("3.6")
@pytest.mark.parametrize(("arch", "kind"), [*MAIN, (100, "native16")])
def test_committed_counts_without_the_tail(arch: int, kind: str) -> None:
    """Those with it are checked where every configuration is compiled with it (``test_forward.py``)."""
    config = choose(arch, kind, 128, 128)
    check_counts(Entry(arch, kind, 128, config, "gate"), compiled(arch, kind, 128, config, bias=0), tail=False)


@pytest.mark.parametrize(("arch", "warps"), [(80, 8), pytest.param(90, 8, marks=pytest.mark.representative), (120, 8)])
def test_a_step_does_the_arithmetic_it_must(arch: int, warps: int) -> None:
    """Each score takes one exponential and each fading one more; the products are those of the definition."""
    config = choose(arch, "native16", 128, 128)
    counts = count_step(Entry(arch, "native16", 128, config, "gate"), compiled(arch, "native16", 128, config, bias=0))
    m, n, d = config.block_m, config.block_n, 128
    assert counts.products == {"bf16": 2.0 * m * n * d} and counts.warps == warps
    # rows fade in every thread that holds a part of them: a row of 128 or 64 columns is held by four
    assert m * n / 32 <= counts.exponentials <= (m * n + 4 * m) / 32 + 8
    assert counts.issued > counts.arithmetic + counts.exponentials
    # two fused multiply-adds or comparisons a score at least: the scale with the maximum, and the maximum itself
    assert counts.arithmetic >= 2 * m * n / 32


@pytest.mark.representative
def test_mnemonics() -> None:
    assert multiplications("HMMA.16816.F32.BF16") == ("bf16", 16 * 8 * 16)
    assert multiplications("HMMA.1688.F32.TF32") == ("tf32", 16 * 8 * 8)
    assert multiplications("IMMA.16832.S8.S8.SAT") == ("int8", 16 * 8 * 32)
    assert multiplications("QGMMA.64x128x32.F32.E4M3.E4M3") == ("fp8", 64 * 128 * 32)
    assert multiplications("HGMMA.64x64x8.F32.TF32") == ("tf32", 64 * 64 * 8)
    assert multiplications("UTCHMMA") is None and multiplications("FFMA") is None


def test_every_product_of_the_gate_is_known() -> None:
    """A mnemonic of a warp's product that the counter could not read would be counted as nothing."""
    code = compiled(90, "int8", 64, Config(64, 64, 4, 2))
    products = [name for name in code.main_loop if re.match(r"[HIQ]G?MMA", name)]
    assert products and all(multiplications(name) for name in products)
    assert triton.__version__ and costmodel.hardware(90).products
