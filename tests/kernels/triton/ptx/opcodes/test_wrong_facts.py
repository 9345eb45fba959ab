"""Wrong facts put into the emulator: each makes tests of opcodes fail. So these tests do pin the facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.ptx.emulator import Fault, barriers, formats, groups, memory, program, tensormap
from tests.kernels.triton.ptx.emulator.instructions import (
    compare,
    control,
    convert,
    copies,
    floating,
    integer,
    matrix,
    mbarrier,
    moves,
    warp,
    wgmma,
)
from tests.kernels.triton.ptx.opcodes import (
    test_barriers,
    test_convert,
    test_copies,
    test_floating,
    test_integer,
    test_matrix,
    test_memory,
    test_moves,
    test_warp,
    test_wgmma,
)

pytestmark = pytest.mark.representative

Test = Callable[[], None]


def _other_bits(addresses: Any, mode: int) -> Any:
    return addresses ^ (((addresses >> 8) & ((1 << mode) - 1)) << 4)


def _no_swizzle(addresses: Any, mode: int) -> Any:
    return addresses


def _exchanged(d: wgmma.Descriptor) -> wgmma.Descriptor:
    return d._replace(leading=d.stride, stride=d.leading)


_core = wgmma.core_offsets
_places = matrix.operand_places
_encode, _sources, _selectors = formats.encode, warp.sources, moves.selectors
_tile = tensormap.TensorMap.tile


def _lanes_of_columns(n: int) -> Any:
    i = np.arange(n // 2)[:, None]
    lane = np.arange(32)
    return (lane >> 2) + 8 * (i >> 1 & 1), (i >> 2) * 8 + (lane & 3) + 4 * (i & 1)


def _exchanged_registers(registers: int, rows: int) -> Any:
    places = _places(registers, rows)
    if registers != 4:
        return places
    word = places // 128
    return places + 128 * (np.choose(word, [0, 2, 1, 3]) - word)


def _reversed_box(self: tensormap.TensorMap, corner: Any) -> Any:
    address, inside = _tile(self, corner)
    order = np.arange(len(address)).reshape(self.box[::-1]).T.ravel()
    return address[order], inside[order]


def _ties_away(x: Any, form: Any, mode: str = "rn", saturate: bool = False) -> Any:
    return _encode(x, form, "rna" if mode == "rn" and form.bits == 8 else mode, saturate)


def _unclamped(b: Any, control_: Any, mode: str) -> Any:
    lane, _ = _sources(b, control_ | 31, mode)
    return lane % 32, np.ones(32, bool)


def _big_endian(code: Any, kind: str) -> None:
    _packed(code, kind)
    code.lines = [
        line.replace("t_[:, 0]", "t_[:, 9]").replace("t_[:, 1]", "t_[:, 0]").replace("t_[:, 9]", "t_[:, 1]")
        for line in code.lines
    ]


_packed = moves._packed

#: Fact -> (what is replaced by what, tests of which at least one must fail).
FACTS: dict[str, tuple[list[tuple[Any, str, Any]], list[Test]]] = {
    "no swizzle in wgmma": (
        [(wgmma, "operand_swizzle", _no_swizzle)],
        [lambda: test_wgmma.test_operands_along_k("bf16", 128)],
    ),
    "no swizzle of tiles": (
        [(copies, "swizzled", _no_swizzle)],
        [lambda: test_copies.test_tiles_of_two_dimensions_and_their_swizzle(64)],
    ),
    "the swizzle from other address bits, in wgmma and tiles alike": (
        [(wgmma, "swizzled", _other_bits), (copies, "swizzled", _other_bits)],
        [lambda: test_wgmma.test_operands_along_k("f16", 64)],
    ),
    "the same, as tiles show it": (
        [(wgmma, "swizzled", _other_bits), (copies, "swizzled", _other_bits)],
        [lambda: test_copies.test_tiles_of_two_dimensions_and_their_swizzle(128)],
    ),
    "leading and stride offsets exchanged": (
        [(wgmma, "core_offsets", lambda rows, item, t, d: _core(rows, item, t, _exchanged(d)))],
        [lambda: test_wgmma.test_operands_along_k("e4m3", 16), lambda: test_wgmma.test_operands_along_their_rows(64)],
    ),
    "operands along their rows read as along k": (
        [(wgmma, "core_offsets", lambda rows, item, t, d: _core(rows, item, False, d))],
        [lambda: test_wgmma.test_operands_along_their_rows(128)],
    ),
    "columns of the accumulators": (
        [(matrix, "accumulator_places", _lanes_of_columns)],
        [lambda: test_matrix.test_products("f16", "k16", 16)],
    ),
    "columns of the accumulators of wgmma": (
        [(matrix, "accumulator_places", _lanes_of_columns)],
        [lambda: test_wgmma.test_operands_along_k("tf32", 128)],
    ),
    "registers 1 and 2 of A exchanged": (
        [(matrix, "operand_places", _exchanged_registers)],
        [lambda: test_matrix.test_products("s8", "k32", 32)],
    ),
    "registers 1 and 2 of A exchanged in wgmma": (
        [(matrix, "operand_places", _exchanged_registers)],
        [test_wgmma.test_a_from_registers_accumulation_and_negation],
    ),
    "the order of a box": (
        [(tensormap.TensorMap, "tile", _reversed_box)],
        [test_copies.test_tiles_of_four_dimensions_lie_innermost_first],
    ),
    "the bytes of a NaN outside of a tensor": (
        [(tensormap.TensorMap, "filling", lambda self: np.zeros(self.item, np.uint8))],
        [lambda: test_copies.test_outside_of_the_tensor_are_zeros_or_nans(test_copies.F16, np.float16)],
    ),
    "ties of e4m3 away from zero": (
        [(convert, "encode", _ties_away)],
        [lambda: test_convert.test_eight_bits_from_float32("e4m3")],
    ),
    "float16 to nearest instead of towards zero": (
        [(convert, "encode", lambda x, form, mode="rn", saturate=False: _encode(x, form, "rn", saturate))],
        [lambda: test_convert.test_half_precision("f16", "rz")],
    ),
    "bfloat16 cut off": (
        [(convert, "to_bf16", lambda x: (x.view(np.uint32) >> 16).astype(np.uint16))],
        [lambda: test_convert.test_half_precision("bf16", "rn")],
    ),
    "tf32 operands with all their bits": (
        [(matrix, "decode", lambda raw, kind: np.ascontiguousarray(raw).view(np.float32).astype(np.float64))],
        [lambda: test_matrix.test_products("tf32", "k8", 8)],
    ),
    "conversions to integers wrap around": (
        [(convert, "to_integer", lambda x, mode, to: np.nan_to_num(x).astype(np.int64).astype(to))],
        [lambda: test_convert.test_float_to_integer("u8", "rzi")],
    ),
    "the parity of an mbarrier": (
        [(barriers, "awaited", lambda phase, parity: (phase & 1) == (parity & 1))],
        [test_barriers.test_the_parity_of_the_phase_before_the_first_is_complete],
    ),
    "phases complete without their bytes": (
        [(barriers.Mbarrier, "land", lambda self, size: None)],
        [lambda: test_copies.test_tiles_of_two_dimensions_and_their_swizzle(32)],
    ),
    "the clamp of a shuffle": (
        [(warp, "sources", _unclamped)],
        [lambda: test_warp.test_shuffles("down", 31)],
    ),
    "the segments of a shuffle": (
        [(warp, "sources", lambda b, c, mode: _sources(b, c & 31, mode))],
        [lambda: test_warp.test_shuffles("idx", 0x1807)],
    ),
    "ldmatrix and stmatrix do not transpose": (
        [(matrix, "matrix_places", lambda transposed, f=matrix.matrix_places: f(False))],
        [lambda: test_matrix.test_matrices_from_shared_memory(4, ".trans")],
    ),
    "prmt copies the byte where it copies the sign": (
        [(moves, "selectors", lambda c, mode: (_selectors(c, mode)[0], np.zeros((4, 32), bool)))],
        [test_moves.test_permuting_bytes],
    ),
    "the order of the parts of a word": (
        [(moves, "_packed", _big_endian)],
        [test_moves.test_words_and_their_parts_are_little_endian],
    ),
    "inputs of lop3 in another order": (
        [(integer, "lop3", lambda x, y, z, table, f=integer.lop3: f(z, y, x, table))],
        [test_integer.test_every_table_of_lop3],
    ),
    "funnel shifts by 32 wrap around": (
        [(integer, "shf", lambda a, b, n, side, mode, f=integer.shf: f(a, b, n, side, "wrap"))],
        [lambda: test_integer.test_funnel_shifts("clamp")],
    ),
    "quotients are rounded down": (
        [(integer, "divide", lambda x, y: x // y)],
        [lambda: test_integer.test_two_numbers("div", "s32")],
    ),
    "bfe without the sign": (
        [(integer, "bfe", lambda x, p, n, f=integer.bfe: f(x.view(f"u{x.dtype.itemsize}"), p, n))],
        [lambda: test_integer.test_extracting_bits("s32")],
    ),
    "comparisons that are true for NaN": (
        [
            (
                compare,
                "floats",
                lambda rel, x, y, f=compare.floats: f(rel[:2] if len(rel) == 3 and rel[-1] == "u" else rel, x, y),
            )
        ],
        [lambda: test_moves.test_comparisons_of_numbers("f32")],
    ),
    "a NaN wins a minimum": (
        [(floating, "smaller", lambda x, y, nan, f=floating.smaller: f(x, y, True))],
        [lambda: test_floating.test_minimum_and_maximum("")],
    ),
    "multiply-adds are rounded twice": (
        [(floating, "fma", lambda x, y, z: (x * y) + z)],
        [test_floating.test_multiply_add_is_rounded_once],
    ),
    "subnormal numbers are kept": (
        [(formats, "ftz", lambda x: x)],
        [test_floating.test_subnormal_numbers_are_flushed],
    ),
    "a barrier does not order": (
        [
            (
                barriers.NamedBarrier,
                "arrive",
                lambda self, w, order, f=barriers.NamedBarrier.arrive: (
                    f(self, w, order),
                    self.known.fill(0),
                    [t.fill(0) for t in self.told],
                )[0],
            )
        ],
        [lambda: test_barriers.test_named_barriers_order_the_warps_that_come({})],
    ),
    "fences between the proxies do nothing": (
        [(control, "fence_proxy", lambda C, w: None)],
        [lambda: test_copies.test_stores_leave_out_what_is_outside("late")],
    ),
    "a wait for groups waits for one fewer": (
        [(groups.Groups, "wait", lambda self, n, f=groups.Groups.wait: f(self, n + 1))],
        [test_copies.test_groups_complete_in_order],
    ),
    "fresh memory counts as written": (
        [(memory, "_EMPTY", 2)],
        [test_memory.test_fresh_global_memory_must_be_written_first],
    ),
    "arrivals count once": (
        [
            (
                mbarrier,
                "arrive",
                lambda C, w, at, a, counts, sizes, mask, f=mbarrier.arrive: f(C, w, at, a, None, sizes, mask),
            )
        ],
        [test_barriers.test_arrivals_are_counted],
    ),
    "members of a warp are not compared": (
        [(warp, "members", lambda C, w, at, named, mask: np.ones(32, bool) if mask is None else mask)],
        [lambda: test_warp.test_lanes_that_are_missing("@%c bar.warp.sync 0xffffffff;")],
    ),
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_wrong_fact_is_noticed(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, tests = FACTS[fact]
    for test in tests:
        test()  # with the right fact it passes
    monkeypatch.setattr(program, "_PROGRAMS", {})  # what was generated with the right fact
    for owner, name, wrong in changes:
        monkeypatch.setattr(owner, name, wrong)
    failed = 0
    for test in tests:
        try:
            test()
        except (AssertionError, Fault, ValueError, IndexError, pytest.fail.Exception):
            failed += 1
    assert failed, f"{fact}: no test of {len(tests)} notices"
