"""The Hopper kernel in Gluon compiled for sm_90, and its machine code read. Its results need a GPU: the self-test."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
import warnings
from typing import Any

import pytest
import torch
import triton

from tests.kernels.helpers import make_layout, random_mask
from vidaccel.kernels import selftest
from vidaccel.kernels.quantise import FP8_MAX
from vidaccel.kernels.triton import hopper_launch
from vidaccel.kernels.triton.gate import MachineCode, compile_for, problems
from vidaccel.kernels.triton.hopper import block_sparse_forward_hopper
from vidaccel.kernels.triton.hopper_launch import CONFIG, launch_arguments, unsupported
from vidaccel.kernels.triton.preparation import Prepared
from vidaccel.kernels.triton.worklist import aligned_offsets, worklist
from vidaccel.layout import TokenLayout
from vidaccel.types import PRECISIONS, Precision

LARGE = make_layout((21, 30, 52), (4, 8, 4), text=13)
V_MEAN = Precision("fp8 with V smoothing", "fp8", "fp8", "block", smooth_v=True)


def compiled(
    precision: Precision,
    head_dim: int,
    *,
    tail: bool = True,
    layout: TokenLayout = LARGE,
    heads: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    lse: bool = True,
) -> tuple[MachineCode, Any]:
    """Its machine code for a call as :mod:`.hopper_launch` makes it, and what Triton made."""

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, tokens = 2, layout.tokens
    keys = tokens + (layout.num_blocks if tail else 0)
    q, k, v = empty(dtype, batch, tokens, heads, head_dim), *(empty(dtype, batch, keys, heads, head_dim),) * 2
    ready = Prepared(q, k, v)
    if precision.quantised:
        fp8, scale = torch.float8_e4m3fn, torch.float32
        ready = Prepared(
            q.to(fp8),
            k.to(fp8),
            empty(fp8, batch, heads, head_dim, int(aligned_offsets(layout)[-1])),
            empty(scale, batch, heads, tokens),
            empty(scale, batch, heads, keys),
            empty(scale, batch, heads, head_dim),
            v_mean=empty(scale, batch, heads, head_dim) if precision.smooth_v else None,
        )
    torch.manual_seed(0)
    mask = random_mask(layout, batch, [0.1] * heads)
    work = worklist(mask, layout, batch, heads, CONFIG.block_m, CONFIG.block_n, tail=tail)
    out, lse_ = empty(dtype, batch, tokens, heads, head_dim), empty(torch.float32, batch, heads, tokens if lse else 0)
    arguments, options = launch_arguments(ready, out, lse_, work, layout, precision, 0.1)

    made: list[Any] = []

    def warmup() -> Any:
        made.append(block_sparse_forward_hopper.warmup(*arguments, **options, grid=(1,)))
        return made[0]

    return compile_for(90, warmup), made[0]


def findings(code: MachineCode, product: str) -> list[str]:
    return problems(code, products=[product], warp_specialised=True, tma=True)


@pytest.mark.parametrize(
    ("precision", "head_dim", "tail"),
    [
        (PRECISIONS["native"], 128, False),
        pytest.param(PRECISIONS["native"], 128, True, marks=pytest.mark.representative),
        (PRECISIONS["native"], 96, False),
        (PRECISIONS["native"], 64, True),
        (V_MEAN, 128, False),
        pytest.param(V_MEAN, 128, True, marks=pytest.mark.representative),
        (V_MEAN, 64, True),
    ],
    ids=str,
)
def test_machine_code(precision: Precision, head_dim: int, tail: bool) -> None:
    code, kernel = compiled(precision, head_dim, tail=tail)
    assert findings(code, "fp8" if precision.quantised else "bf16") == []
    # three warpgroups share 65,536 registers at the start
    assert code.registers <= 168
    # q of each consumer, K and V: no tile comes another way
    assert code.tma_loads >= 4
    if precision.quantised:
        assert code.count(r"STSM?\b", code.main_loop) == 0, "weights make a trip through memory"
    elif head_dim == 128:
        check_overlap(kernel)


def check_overlap(kernel: Any) -> None:
    """The tensor cores work beside the exponentials: in the main loop both products are issued, the scores waited for,
    then all exponentials, and only then the other product."""
    runs = [(name, len(list(group))) for name, group in itertools.groupby(order(kernel))]
    loops = [i for i, run in enumerate(runs) if run == ("product", 16)]
    assert len(loops) == 2  # one for each consumer
    for i in loops:
        assert [name for name, _ in runs[i : i + 4]] == ["product", "wait 1", "exponential", "wait 0"]
        assert runs[i + 2][1] >= 64  # a thread's share of 64x128 scores


def order(kernel: Any) -> list[str]:
    """Products, waits for them and exponentials of a compiled kernel, in program order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"HGMMA|DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2", text)
    names = {"HGMMA": "product", "MUFU.EX2": "exponential"}
    return [names.get(name, f"wait {name[-1]}") for name in found]


@pytest.mark.parametrize(("name", "product"), [("native", "bf16"), ("fp8-tile", "fp8")])
def test_uniform_blocks_of_one_head(name: str, product: str) -> None:
    """Sizes that are 1 become constants, and nothing is masked."""
    layout = make_layout((4, 8, 4), (4, 8, 4))
    assert layout.num_blocks == 1
    code, _ = compiled(PRECISIONS[name], 128, tail=False, layout=layout, heads=1, lse=False)
    assert findings(code, product) == []


def test_fp16() -> None:
    code, _ = compiled(PRECISIONS["native"], 128, dtype=torch.float16)
    assert findings(code, "fp16") == []


def test_the_range_of_fp8_weights() -> None:
    assert FP8_MAX == 448.0  # which the kernel writes as log2(448)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"precision": PRECISIONS["int8"]}, "neither native nor fp8"),
        ({"precision": Precision("x", "fp8", "fp8", "rows32")}, "32 rows"),
        ({"precision": Precision("x", "fp8", "fp8", smooth_q=True)}, "Q smoothing"),
        ({"skip": True}, "skip"),
        ({"head_dim": 256}, "up to 128 channels"),
        ({"block_tokens": 64}, "idle"),
    ],
    ids=str,
)
def test_what_it_leaves_to_the_other_kernel(change: dict[str, Any], text: str) -> None:
    call: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "precision": PRECISIONS["native"]}
    call |= {"block_tokens": 128, "skip": False}

    def reason(dtype: torch.dtype, head_dim: int, precision: Precision, block_tokens: int, skip: bool) -> str | None:
        return unsupported(dtype, head_dim, precision, block_tokens, skip=skip)

    assert reason(**call) is None
    found = reason(**(call | change))
    assert found is not None and text in found


def test_the_self_test_runs_every_case() -> None:
    assert hopper_launch._cases() == list(selftest.CASES)


def test_no_device_but_hopper_gets_it() -> None:
    q = torch.empty(1, LARGE.tokens, 1, 128, dtype=torch.bfloat16)
    assert "not on cpu" in str(hopper_launch.why_not(q, LARGE, PRECISIONS["native"], skip=False))


@pytest.mark.parametrize("passed", [True, False])
def test_the_verdict_decides_and_is_said_once(monkeypatch: pytest.MonkeyPatch, passed: bool) -> None:
    asked = []

    def verdict(name: str, machine: Any, test: Any) -> tuple[selftest.Verdict, bool]:
        asked.append(name)
        return selftest.Verdict(
            "right" if passed else "wrong", None if passed else "case 'bf16 ragged': too far off"
        ), True

    monkeypatch.setattr(hopper_launch, "_FAILURES", {})
    monkeypatch.setattr(hopper_launch, "machine", lambda device: {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(selftest, "verdict", verdict)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reasons = [hopper_launch._failure(0) for _ in range(2)]
    assert asked == ["hopper"] and reasons[0] == reasons[1]
    if passed:
        assert reasons[0] is None and not said
    else:
        assert "too far off" in str(reasons[0])
        assert len(said) == 1 and "too far off" in str(said[0].message)


def test_no_self_test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_launch, "_FAILURES", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in str(hopper_launch._failure(0))
    assert hopper_launch._FAILURES == {}  # the next call may test it
