"""cp.async and tiles by tensormaps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.kernels.triton.ptx.emulator import Fault
from tests.kernels.triton.ptx.emulator.tensormap import TensorMap
from tests.kernels.triton.ptx.opcodes.programs import Run, run

pytestmark = pytest.mark.representative

RANDOM = np.random.default_rng(8)
Array = np.ndarray[Any, Any]

# -- cp.async ------------------------------------------------------------------------------------------------------

PLACE = """
mov.u32 %base, smem; shl.b32 %x, %thread, 4; add.u32 %at, %base, %x; cvt.u64.u32 %wide, %x; add.u64 %from, %t, %wide;
"""
DECLARE = ".reg .b32 %base, %at, %x, %y, %z, %w<4>; .reg .b64 %wide, %from; .reg .pred %p, %q;"
LOAD = "ld.shared.v4.b32 {%w0, %w1, %w2, %w3}, [%at];"
OUT = "mov.b32 %d0, %w0; mov.b32 %d1, %w1; mov.b32 %d2, %w2; mov.b32 %d3, %w3;"


def copying(body: str, **options: Any) -> Run:
    data = np.arange(256, dtype=np.uint32)
    options = {"warps": 1, "shared": 2048, **options}
    return run(PLACE + body + OUT, {}, {"d": (4, np.uint32)}, arrays={"t": data}, registers=DECLARE, **options)


def kinds(body: str, **options: Any) -> set[str]:
    try:
        return copying(body, **options).kinds
    except Fault as fault:
        return set(fault.__notes__)


COPY, COMMIT = "cp.async.cg.shared.global [%at], [%from], 16;", "cp.async.commit_group;"


@pytest.mark.parametrize("asynchronous", ["late", "early", "random"])
def test_copies_of_lanes(asynchronous: str) -> None:
    got = copying(COPY + COMMIT + "cp.async.wait_group 0;" + LOAD, asynchronous=asynchronous)
    assert got["d"].T.ravel().tolist() == list(range(128)) and not got.faults


def test_a_copy_of_fewer_bytes_is_filled_with_zeros() -> None:
    sizes = np.array([0, 4, 8, 12, 16, 1, 6, 16] * 4, np.uint32)
    body = PLACE + "cp.async.ca.shared.global [%at], [%from], 16, %s; cp.async.wait_all;" + LOAD + OUT
    data = RANDOM.integers(0, 256, 512).astype(np.uint8)
    got = run(body, {"s": sizes}, {"d": (4, np.uint32)}, arrays={"t": data}, registers=DECLARE, shared=512)
    raw = got["d"].T.copy().view(np.uint8)
    for lane, n in enumerate(sizes.tolist()):
        assert raw[lane, :n].tolist() == data[16 * lane : 16 * lane + n].tolist() and not raw[lane, n:].any()


def test_groups_complete_in_order() -> None:
    body = COPY + COMMIT + "add.u64 %from, %from, 512; add.u32 %at, %at, 512;" + COPY + COMMIT
    for wait, back, right in (("1", 512, True), ("0", 512, True), ("0", 0, True), ("1", 0, False), ("2", 512, False)):
        done = body + f"cp.async.wait_group {wait}; sub.u32 %at, %at, {back};" + LOAD + "cp.async.wait_all;"
        assert (kinds(done) == set()) == right
        if not right:
            assert kinds(done) & {"race", "uninitialised"}
            assert "race" in kinds(done, asynchronous="early")


def test_other_warps_need_a_barrier_as_well() -> None:
    flip = "sub.u32 %at, %at, %base; xor.b32 %at, %at, 512; add.u32 %at, %at, %base;"
    whole = COPY + COMMIT + "cp.async.wait_group 0; bar.sync 0;" + flip + LOAD
    assert kinds(whole, warps=2) == set()
    assert kinds(whole.replace("bar.sync 0;", ""), warps=2) & {"race", "uninitialised"}
    assert kinds(whole.replace("cp.async.wait_group 0;", ""), warps=2) & {"race", "uninitialised"}
    assert kinds(whole.replace("cp.async.wait_group 0; bar.sync 0;", "bar.sync 0; cp.async.wait_group 0;"), warps=2) & {
        "race",
        "uninitialised",
    }


def test_copies_that_are_wrong() -> None:
    assert kinds(COPY + COMMIT + "st.shared.b32 [%at], %x; cp.async.wait_all;" + LOAD) & {"race"}
    assert "unfinished" in kinds("st.shared.v4.b32 [%at], {%x, %x, %x, %x};" + LOAD + COPY + COMMIT)
    assert "bounds" in kinds("add.u64 %from, %from, 1024;" + COPY + COMMIT + "cp.async.wait_all;" + LOAD)
    assert "bounds" in kinds("add.u32 %at, %at, 2048;" + COPY + COMMIT + "cp.async.wait_all;")
    assert "alignment" in kinds("add.u32 %at, %at, 8;" + COPY)
    # lanes that read nothing may have any address
    assert (
        kinds(
            "mov.u32 %y, 0; add.u64 %from, %from, 4096; "
            "cp.async.cg.shared.global [%at], [%from], 16, %y; cp.async.wait_all;" + LOAD
        )
        == set()
    )


# -- tiles ---------------------------------------------------------------------------------------------------------

TILE = ".reg .b32 %base, %at, %x, %y, %n; .reg .b64 %wide, %to; .reg .pred %p;"
BEGIN = """
mov.u32 %base, smem; mov.u32 %n, 0;
@%first mbarrier.init.shared::cta.b64 [smem], 1; @%first fence.proxy.async.shared::cta; bar.sync 0;
"""
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p, [smem], 0; @!%p bra W;"
#: Copies shared memory from byte 1024 to %out.
DUMP = """
shl.b32 %x, %thread, 2; add.u32 %at, %base, %x; cvt.u64.u32 %wide, %x; add.u64 %to, %out, %wide;
D: ld.shared.b32 %y, [%at+1024]; st.global.b32 [%to], %y; add.u32 %at, %at, 128; add.u64 %to, %to, 128;
add.u32 %n, %n, 128;
setp.lt.u32 %p, %n, {size}; @%p bra D;
"""


def load(
    corner: tuple[int, ...], size: int, rank: int, *, lines: Any = None, expect: int | None = None, **options: Any
) -> Run:
    numbers = ", ".join(map(str, corner))
    body = [
        BEGIN,
        f"@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], {size if expect is None else expect};",
        f"@%first cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[smem+1024], [%m, {{{numbers}}}], [smem];",
        WAIT,
        DUMP.format(size=size),
    ]
    body = lines(body) if lines else body
    options = {"shared": 1024 + size, **options}
    return run("\n".join(body), registers=TILE, **options)


def unswizzled(raw: Array, span: int) -> Array:
    """Puts each 16-byte piece back: in line l (128 bytes) piece p lies at p ^ (l % (span / 16))."""
    if span == 16:
        return raw
    pieces = raw.reshape(-1, 8, 16)
    out = np.zeros_like(pieces)
    for line, piece in itertools.product(range(len(pieces)), range(8)):
        out[line, piece] = pieces[line, piece ^ line % (span // 16)]
    return out.reshape(raw.shape)


SPANS = {16: 0, 32: 1, 64: 2, 128: 3}
U16, F16, F32, BF16 = 1, 6, 7, 10


@pytest.mark.parametrize("span", SPANS)
def test_tiles_of_two_dimensions_and_their_swizzle(span: int) -> None:
    data = RANDOM.integers(0, 1 << 16, (40, 96)).astype(np.uint16)
    wide = max(span // 2, 8)
    m = TensorMap(0, U16, (wide, 16), (90, 40), (192,), SPANS[span], steps=(1, 1))
    size = 16 * wide * 2
    for corner in ((0, 0), (8, 5), (-8, -3), (72, 30), (89, 39)):
        got = load(corner, size, 2, arrays={"m_data": data, "out": np.zeros(size, np.uint8)}, maps={"m": m})
        tile = unswizzled(got.arrays["out"], span).view(np.uint16).reshape(16, wide)
        for i, j in itertools.product(range(16), range(wide)):
            row, column = corner[1] + i, corner[0] + j
            inside = 0 <= row < 40 and 0 <= column < 90
            assert tile[i, j] == (data[row, column] if inside else 0), (corner, i, j)
        assert not got.faults


def test_tiles_of_four_dimensions_lie_innermost_first() -> None:
    data = RANDOM.normal(size=(3, 5, 4, 8)).astype(np.float32)
    m = TensorMap(0, F32, (4, 2, 2, 2), (8, 4, 5, 3), (32, 128, 640), steps=(1,) * 4)
    got = load((4, 1, 3, 1), 128, 4, arrays={"m_data": data, "out": np.zeros(128, np.uint8)}, maps={"m": m})
    assert (got.arrays["out"].view(np.float32).reshape(2, 2, 2, 4) == data[1:3, 3:5, 1:3, 4:8]).all()


@pytest.mark.parametrize(("element", "dtype"), [(F16, np.float16), (F32, np.float32), (BF16, np.uint16)])
def test_outside_of_the_tensor_are_zeros_or_nans(element: int, dtype: Any) -> None:
    data = np.ones((8, 16), dtype)
    for fill in (0, 1):
        m = TensorMap(0, element, (16, 8), (16, 8), (data.strides[0],), fill=fill, steps=(1, 1))
        size = data.nbytes
        got = load((0, 5), size, 2, arrays={"m_data": data, "out": np.zeros(size, np.uint8)}, maps={"m": m})
        tile = got.arrays["out"].view(dtype).reshape(8, 16)
        assert (tile[:3] == 1).all()
        outside = tile[3:] if dtype != np.uint16 else (tile[3:].astype(np.uint32) << 16).view(np.float32)
        assert np.isnan(outside).all() if fill else not outside.any()


STORE = """
mov.u32 %base, smem; shl.b32 %x, %thread, 4; add.u32 %at, %base, %x; mov.b32 %y, %thread;
st.shared.v4.b32 [%at], {%y, %y, %y, %y}; fence.proxy.async.shared::cta; bar.sync 0;
@%first cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%m, {4, 6}], [smem];
@%first cp.async.bulk.commit_group; @%first cp.async.bulk.wait_group.read 0;
"""


def store(change: Any = None, **options: Any) -> Run:
    """Stores a tile of 8 x 16 words, of which the last rows are outside of the tensor of 12 rows."""
    m = TensorMap(0, 2, (16, 8), (24, 12), (96,), steps=(1, 1))
    body = change(STORE) if change else STORE
    return run(
        body, arrays={"m_data": np.zeros((12, 24), np.uint32)}, maps={"m": m}, registers=TILE, shared=1024, **options
    )


@pytest.mark.parametrize("asynchronous", ["late", "early", "random"])
def test_stores_leave_out_what_is_outside(asynchronous: str) -> None:
    got = store(asynchronous=asynchronous)
    wanted = np.zeros((12, 24), np.uint32)
    wanted[6:, 4:20] = (np.arange(96) // 4).reshape(6, 16)
    assert (got.arrays["m_data"] == wanted).all() and not got.faults


@pytest.mark.parametrize("asynchronous", ["late", "early"])
def test_stores_that_are_wrong(asynchronous: str) -> None:
    def kinds(change: Any) -> set[str]:
        return store(change, asynchronous=asynchronous).kinds

    assert kinds(lambda s: s.replace("fence.proxy.async.shared::cta;", "")) == {"proxy"}
    assert kinds(lambda s: s.replace("@%first cp.async.bulk.wait_group.read 0;", "")) == {"unfinished"}
    assert kinds(lambda s: s.replace("@%first cp.async.bulk.commit_group;", "")) == {"unfinished"}
    overwrite = "@%first st.shared.b32 [smem], %base;"
    assert "race" in kinds(
        lambda s: s.replace("@%first cp.async.bulk.wait_group", overwrite + "@%first cp.async.bulk.wait_group")
    )
    assert kinds(lambda s: s + overwrite) == set()


def tile(lines: Any = None, **options: Any) -> set[str]:
    """The kinds of faults of a load of 16 rows of 128 bytes with something changed."""
    data = RANDOM.integers(0, 1 << 16, (32, 64)).astype(np.uint16)
    element = options.pop("map", {})
    m = TensorMap(
        **{
            "base": 0,
            "element": U16,
            "box": (64, 16),
            "shape": (64, 32),
            "strides": (128,),
            "swizzle": 3,
            "steps": (1, 1),
        }
        | element
    )
    try:
        got = load(
            (0, 0),
            2048,
            2,
            lines=lines,
            arrays={"m_data": data, "out": np.zeros(2048, np.uint8)},
            maps={"m": m},
            **options,
        )
    except Fault as fault:
        return set(fault.__notes__)
    return got.kinds


@pytest.mark.parametrize("asynchronous", ["late", "early", "random"])
def test_transactions_are_counted(asynchronous: str) -> None:
    options = {"asynchronous": asynchronous}
    assert tile(**options) == set()
    assert tile(expect=2048 + 16, **options) == {"deadlock"}
    assert "deadlock" in tile(expect=1024, **options)
    twice = lambda x: [*x[:2], x[2], x[2].replace("smem+1024", "smem+3072"), *x[3:]]  # noqa: E731 - one line
    found = tile(twice, shared=5120, **options)  # the second load is not announced
    assert "barrier" in found
    assert tile(lambda x: twice([x[0], x[1].replace("2048", "4096"), *x[2:]]), shared=5120, **options) == set()
    separate = (
        "@%first mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [smem], 2048; "
        "@%first mbarrier.arrive.shared::cta.b64 _, [smem];"
    )
    assert tile(lambda x: [x[0], separate, *x[2:]], **options) == set()


@pytest.mark.parametrize("asynchronous", ["late", "early"])
def test_loads_that_are_wrong(asynchronous: str) -> None:
    options = {"asynchronous": asynchronous}
    no_wait = lambda x: [*x[:3], x[4], x[3]]  # noqa: E731 - one line
    assert tile(no_wait, **options) & {"race", "uninitialised"}
    assert tile(lambda x: [x[0].replace("@%first fence.proxy.async.shared::cta;", ""), *x[1:]], **options) == {"proxy"}
    fence = "@%first fence.mbarrier_init.release.cluster;"
    assert tile(lambda x: [x[0].replace("@%first fence.proxy.async.shared::cta;", fence), *x[1:]], **options) == set()
    written = "shl.b32 %x, %thread, 2; add.u32 %at, %base, %x; st.shared.b32 [%at+1024], %x; {} bar.sync 0;"
    assert tile(lambda x: [x[0], written.format(""), *x[1:]], **options) == {"proxy"}
    assert tile(lambda x: [x[0], written.format("fence.proxy.async.shared::cta;"), *x[1:]], **options) == set()
    late = written.format("").replace("bar.sync 0;", "")
    assert "race" in tile(lambda x: [*x[:3], late, *x[3:]], **options)
    inval = "@%first mbarrier.inval.shared::cta.b64 [smem];"
    assert tile(lambda x: [*x, "bar.sync 0;" + inval], **options) == set()
    assert "barrier" in tile(lambda x: [*x[:3], inval], asynchronous="late")
    assert "alignment" in tile(
        lambda x: [*x[:2], x[2].replace("smem+1024", "smem+1088"), *x[3:]], shared=4096, **options
    )
    assert "bounds" in tile(shared=2048, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": 8},
        {"strides": (120,)},
        {"box": (64, 300)},
        {"box": (60, 16)},
        {"swizzle": 2},
        {"swizzle": 5},
        {"element": 77},
        {"steps": (1, 2)},
        {"interleave": 1},
        {"fill": 2},
        {"shape": (64,), "box": (64,), "strides": (), "steps": (1,)},
    ],
)
def test_tensormaps_that_no_hardware_takes(wrong: dict[str, Any]) -> None:
    assert "descriptor" in tile(map=wrong)


def test_the_address_of_a_parameter_may_have_32_bits() -> None:
    """As Triton 3.9 writes it: ``cvta.param`` makes it generic."""
    body = """
    mov.b32 %x, p_t; cvt.u64.u32 %wide, %x; cvta.param.u64 %wide, %wide; ld.b64 %wide, [%wide];
    ld.global.b32 %d, [%wide];
    """
    data = np.array([77], np.uint32)
    got = run(body, {}, {"d": np.uint32}, arrays={"t": data}, registers=".reg .b32 %x; .reg .b64 %wide;")
    assert (got["d"] == 77).all()


def test_a_tensor_that_is_larger_than_its_memory() -> None:
    assert "bounds" in tile(map={"shape": (64, 64), "box": (64, 16), "strides": (512,)})


# -- tensormaps made on the device ---------------------------------------------------------------------------------

MAKE = """
mov.u32 %base, smem; shl.b32 %x, %thread, 2; add.u32 %at, %base, %x; mov.u32 %y, 0; st.shared.b32 [%at+256], %y;
bar.sync 0;
@%first tensormap.replace.tile.global_address.shared::cta.b1024.b64 [smem+256], %data;
@%first tensormap.replace.tile.rank.shared::cta.b1024.b32 [smem+256], 1;
@%first tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [smem+256], 0, 16;
@%first tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [smem+256], 1, 4;
@%first tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [smem+256], 0, 32;
@%first tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [smem+256], 1, 8;
@%first tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [smem+256], 0, 128;
@%first tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [smem+256], 0, 1;
@%first tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [smem+256], 1, 1;
@%first tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [smem+256], 7;
@%first tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [smem+256], 0;
@%first tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [smem+256], 0;
@%first tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [smem+256], 0;
bar.warp.sync 0xffffffff; add.u32 %at, %base, 256; cvt.u64.u32 %wide, %at;
"""
PUBLISH = "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%m], [%at], 128;"
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%m], 128;"


def made(publish: str = PUBLISH, acquire: str = ACQUIRE, make: str = MAKE) -> Run:
    data = np.arange(256, dtype=np.float32).reshape(8, 32)
    use = BEGIN + (
        "@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 256; "
        "@%first cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
        "[smem+1024], [%m, {8, 3}], [smem];"
    )
    body = make + publish + acquire + use + WAIT + DUMP.format(size=256)
    arrays = {"data": data, "out": np.zeros(64, np.float32)}
    return run(body, arrays=arrays, fresh={"m": 128}, registers=TILE, shared=2048)


def test_tensormaps_made_on_the_device() -> None:
    got = made()
    assert (got.arrays["out"].reshape(4, 16) == np.arange(256).reshape(8, 32)[3:7, 8:24]).all() and not got.faults


def test_tensormaps_must_be_published_and_acquired() -> None:
    assert made(acquire="").kinds == {"fence"}
    with pytest.raises(Fault) as found:
        made(publish="")
    assert {"fence", "uninitialised"} <= set(found.value.__notes__)
    with pytest.raises(Fault) as found:
        made(make=MAKE.replace("[smem+256], 0, 128;", "[smem+256], 0, 100;"))
    assert found.value.kind == "descriptor"
