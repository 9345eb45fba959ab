"""Every shipped launch configuration compiled for its architecture, and its machine code read.

With the pooled tail and the LSE on: the largest variant of the kernel, so the others have room too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from tests.kernels.triton.gate.forward_code import check_counts, compiled
from tests.kernels.triton.moved_columns import moved_columns
from vidaccel.kernels.triton import counting
from vidaccel.kernels.triton.configs import Config, Entry, choose, for_skipping, table
from vidaccel.kernels.triton.counting import FORMATS
from vidaccel.kernels.triton.gate import MachineCode, problems


def findings(code: MachineCode, kind: str, config: Config) -> list[str]:
    """What is wrong with it; nothing where Triton knows no better instruction for int8."""
    products = [name for name in dict.fromkeys(FORMATS[kind]) if (code.arch, name) != (100, "int8")]
    whole_rows = ("q_tile", "out_tile") if config.warp_specialize else ()
    found = problems(code, products=products, warp_specialised=config.warp_specialize, whole_rows=whole_rows)
    if code.arch == 100 and "int8" in FORMATS[kind]:
        found = [text for text in found if "generation before" not in text]
    return found


def entry_id(entry: Entry) -> str:
    return f"{entry.arch}-{entry.kind}-{entry.head_dim}-{entry.config.block_m}x{entry.config.block_n}"


def representative(entry: Entry) -> bool:
    """Whether it is what long videos use: in every precision on Hopper, in two on each other generation."""
    same = [e for e in table() if (e.arch, e.kind) == (entry.arch, entry.kind) and e.head_dim <= 128]
    most = max(e.head_dim for e in same)
    wanted = entry.arch == 90 or (entry.arch in (89, 100, 120) and entry.kind in ("native16", "fp8-fp8"))
    return wanted and entry == next(e for e in same if e.head_dim == most)


#: Found fit by Triton 3.6, and spilled by 3.9: 12 to 44 bytes on sm_86 and sm_89, 24 to 1512 bytes on sm_100.
SPILLS = {
    "3.9": {
        "86-native16-128-32x32", "86-native16-256-64x32", "89-native16-128-32x32", "89-native16-256-64x32",
        "100-native16-256-128x64", "100-native16-256-64x64", "100-int8-fp8-256-128x64", "100-int8-fp8-256-64x64",
    },
}  # fmt: skip


def expect_spills(request: pytest.FixtureRequest, entry: Entry, known: dict[str, set[str]]) -> None:
    """Strict, so that a repair is noticed. Such code is right and slow.

    Args:
        known: version of Triton -> the configurations that it spills.
    """
    if any(triton.__version__.startswith(f"{version}.") and entry_id(entry) in ids for version, ids in known.items()):
        request.applymarker(pytest.mark.xfail(strict=True, reason=f"spills on Triton {triton.__version__}"))


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=[pytest.mark.representative] * representative(e), id=entry_id(e)) for e in table()],
)
def test_shipped_configuration(entry: Entry, request: pytest.FixtureRequest) -> None:
    expect_spills(request, entry, SPILLS)
    code = compiled(entry.arch, entry.kind, entry.head_dim, entry.config)
    assert findings(code, entry.kind, entry.config) == []
    if triton.__version__.startswith("3.6."):  # whose counts are the committed ones
        check_counts(entry, code, tail=True)


HOPPER = [entry for entry in table() if entry.arch == 90 and entry.config.warp_specialize and entry.head_dim == 128]


@pytest.mark.parametrize("entry", HOPPER, ids=entry_id)
def test_q_smoothing_on_hopper(entry: Entry) -> None:
    """Every key with a bias keeps the warps specialised."""
    assert findings(compiled(90, entry.kind, 128, entry.config, bias=2), entry.kind, entry.config) == []


LONG = [
    entry for entry in table() if entry.kind == "native16" and entry.head_dim == 128 and entry.config.block_m == 128
]


@pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=[pytest.mark.representative] * (e.arch == 90), id=entry_id(e)) for e in LONG]
)
def test_blocks_of_variable_size(entry: Entry) -> None:
    """They run as the variant in which every key has a bias."""
    assert findings(compiled(entry.arch, entry.kind, 128, entry.config, bias=2), entry.kind, entry.config) == []


# the largest tiles at the most channels that may skip
SKIPPING = [entry for entry in table() if entry.arch != 100 and entry.head_dim == 128 and entry.config.block_m == 128]


@pytest.mark.triton("3.6")
@pytest.mark.parametrize("entry", SKIPPING, ids=entry_id)
def test_skipping(entry: Entry) -> None:
    """A branch in the loop rules out specialised warps, so skipping does without."""
    plain = for_skipping(entry.config)
    assert findings(compiled(entry.arch, entry.kind, 128, plain, skip=True), entry.kind, plain) == []


@pytest.mark.representative
def test_fp8_products_start_from_zero() -> None:
    """Each key piece's product has an accumulator of its own, added in float32 (SageAttention2's two levels)."""
    config = choose(90, "fp8-fp8", 128, 128)
    fp8, native = compiled(90, "fp8-fp8", 128, config), compiled(90, "native16", 128, config)
    # the second level is one addition for each accumulated value of a thread, fused with the rescaling
    assert fp8.count("FFMA") >= native.count("FFMA") + 128


@pytest.mark.representative
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


@pytest.mark.representative
def test_columns_that_move_with_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Machine code that looks in order, and garbage in the second consumer's rows."""
    monkeypatch.setattr(counting, "block_sparse_forward", moved_columns(tmp_path))
    config = choose(90, "native16", 128, 128)
    found = findings(counting.compile_forward(90, "native16", 128, config), "native16", config)
    assert {text for text in found if "one value" in text} == {
        f"{tile} at [{at}, {at}]: row and column are one value"
        for tile in ("q_tile is loaded", "out_tile is stored")
        for at in (0, 64)
    }
    assert [text for text in found if "column 0" in text] == [
        f"{tile} at [64, 64], which is not column 0" for tile in ("q_tile is loaded", "out_tile is stored")
    ]
