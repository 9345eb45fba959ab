"""The self-test itself: a right kernel passes, each way of being wrong is found, and a verdict is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.blockmask import BlockMask
from vidaccel.errors import VidaccelWarning
from vidaccel.kernels import reference, selftest
from vidaccel.kernels.selftest import CASES, Case, Verdict, examine, in_own_process, verdict
from vidaccel.layout import TokenLayout
from vidaccel.types import Precision

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"grid": (3, 5, 7), "tile": (2, 4, 4), "text": 5, "head_dim": 64}
FEW = (
    Case("bf16", **SMALL, batch=2, densities=(0.0, 0.5, 1.0)),
    Case("bf16 tail", **SMALL, densities=(0.0, 0.5), tail=True),
    Case("fp8", **SMALL, densities=(0.3, 1.0), precision="fp8-tile"),
    Case("fp8 tail", **SMALL, densities=(0.3,), precision="fp8-tile", tail=True),
)


def right(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    precision: Precision,
    tail: bool,
) -> None:
    """The oracle in float32 with its weights rounded to the inputs' dtype, which is what a kernel does."""
    options = {"precision": precision, "tail": tail, "return_lse": True, "compute_dtype": torch.float32}
    # rounding v as well as the weights is one rounding more than a kernel's
    made, made_lse = reference.block_sparse_attention(q, k, v, layout, mask, **options)
    out.copy_(made)
    lse.copy_(made_lse)


def wrong(change: Callable[..., None]) -> Callable[..., None]:
    """A kernel that is right but for what ``change(q, k, v, layout, mask, out, lse)`` does afterwards."""

    def kernel(*tensors: Any, **options: Any) -> None:
        right(*tensors, **options)
        change(*tensors)

    return kernel


def test_a_right_kernel_passes() -> None:
    found = examine(right, CPU, FEW)
    assert found.passed and found.reason is None
    assert list(found.errors) == [case.name for case in FEW]
    assert all(0 < share <= 1 for share in found.errors.values())


def test_the_cases_reach_every_edge() -> None:
    """Lists of one piece, ragged and uniform blocks, blocks for both warpgroups, both kinds with and without a tail."""
    kinds = {(case.precision, case.tail) for case in CASES}
    assert kinds == {("native", False), ("native", True), ("fp8-tile", False), ("fp8-tile", True)}
    assert any(0.0 in case.densities for case in CASES) and any(1.0 in case.densities for case in CASES)
    assert {case.head_dim for case in CASES} == {64, 96, 128}
    assert all(math.prod(case.tile) > 64 for case in CASES)


def unwritten(q: Any, k: Any, v: Any, layout: TokenLayout, mask: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    out[:, -1, 0] = math.nan


def past_the_end(q: Any, k: Any, v: Any, layout: TokenLayout, mask: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0.0)


def base_two(q: Any, k: Any, v: Any, layout: TokenLayout, mask: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    lse /= math.log(2)


def one_row(q: Any, k: Any, v: Any, layout: TokenLayout, mask: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
    out[:, 7] = out[:, 8]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (unwritten, "not finite"),
        (past_the_end, "outside of the output"),
        (base_two, "the LSE's error"),
        (one_row, "the output's error"),
    ],
)
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_a_wrong_result_is_found(change: Callable[..., None], text: str, case: Case) -> None:
    if case.name == "fp8 tail" and change is one_row:
        pytest.skip("one row is within what rounding the tail to fp8 may cost on the whole")
    found = examine(wrong(change), CPU, [case])
    assert not found.passed and found.reason is not None and text in found.reason


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_a_missed_key_block_is_found(case: Case) -> None:
    """The last block of every list left out where it has more than one: a barrier's off-by-one."""

    def shorter(q: Any, k: Any, v: Any, layout: Any, mask: BlockMask, *rest: Any, **options: Any) -> None:
        fewer = BlockMask((mask.kv_num_blocks - 1).clamp(min=1), mask.kv_indices)
        right(q, k, v, layout, fewer, *rest, **options)

    found = examine(shorter, CPU, [case])
    assert not found.passed


def test_a_wrong_scale_is_found() -> None:
    def scaled(q: torch.Tensor, *rest: Any, **options: Any) -> None:
        right(q * 1.1, *rest, **options)

    assert not examine(scaled, CPU, FEW[2:3]).passed


def test_it_stops_at_the_first_wrong_case() -> None:
    found = examine(wrong(unwritten), CPU, FEW)
    assert list(found.errors) == [FEW[0].name]


def test_a_verdict_is_kept(tmp_path: Path) -> None:
    calls = []

    def test() -> Verdict:
        calls.append(1)
        return Verdict("wrong", "case 'bf16': too far off", {"bf16": 3.5})

    machine = {"device": "some GPU", "triton": "3.6.0"}
    first, fresh = verdict("hopper", machine, test, tmp_path / "cache")
    again, refreshed = verdict("hopper", machine, test, tmp_path / "cache")
    assert (fresh, refreshed, len(calls)) == (True, False, 1)
    assert first == again
    verdict("hopper", {**machine, "triton": "3.7.0"}, test, tmp_path / "cache")
    assert len(calls) == 2
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 2 and not [file for file in files if "partial" in file.name]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"outcome": "right"}', '{"machine": {}, "outcome": "right", "reason": null, "errors": {}}']
)
def test_a_damaged_file_is_no_verdict(tmp_path: Path, text: str) -> None:
    machine = {"device": "some GPU"}
    verdict("hopper", machine, lambda: Verdict("right"), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    found, fresh = verdict("hopper", machine, lambda: Verdict("wrong", "wrong"), tmp_path)
    assert fresh and not found.passed
    assert json.loads(file.read_text())["reason"] == "wrong"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(VidaccelWarning, match="was not kept"):
        found, fresh = verdict("hopper", {}, lambda: Verdict("right"), tmp_path / "file" / "cache")
    assert found.passed and fresh


def run(code: str, seconds: float = 60) -> Verdict:
    """The verdict of a process that runs this code; a quick one, without torch."""
    return in_own_process("builtins", "exec", code, seconds)


def test_in_its_own_process() -> None:
    passed = Verdict("right", None, {"bf16": 0.5})
    assert run(f"print('noise'); print({json.dumps(passed.to_dict())!r})") == passed


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise RuntimeError('an illegal memory access')", "ended with code 1: RuntimeError: an illegal memory access"),
        ("import os; os.abort()", "ended with code -6"),
    ],
)
def test_a_crash_is_a_failure(code: str, text: str) -> None:
    found = run(code)
    assert found.outcome == "wrong" and found.reason is not None and text in found.reason


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('fine, I think')", "'fine, I think' instead of a verdict"),
        ("print('{}')", "instead of a verdict"),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "the GPU's memory is taken"),
        (
            "raise RuntimeError('CUDA error: all CUDA-capable devices are busy or unavailable')",
            "the GPU is another process's alone (exclusive mode)",
        ),
        ("raise RuntimeError('No CUDA GPUs are available')", "its process sees no GPU"),
        ("raise RuntimeError('Failed to find C compiler.')", "no C compiler was found"),
    ],
)
def test_what_says_nothing_about_the_kernel_is_told_apart(tmp_path: Path, code: str, text: str) -> None:
    found, fresh = verdict("hopper", {}, lambda: run(code), tmp_path)
    assert found.outcome == "untested" and found.reason is not None and text in found.reason
    assert fresh and not found.passed and not list(tmp_path.iterdir()), "it is tried again in the next process"


def test_a_hang_is_ended() -> None:
    assert run("import time; time.sleep(60)", seconds=0.5) == Verdict("untested", "it did not end within 0.5 seconds")


def test_a_process_says_how_far_it_is() -> None:
    said: list[str] = []
    code = f"print('one'); print('two'); print({json.dumps(Verdict('right').to_dict())!r})"
    assert in_own_process("builtins", "exec", code, 60, said.append).passed
    assert said == ["one", "two"]


def test_it_needs_no_triton() -> None:
    for source in Path(str(selftest.__file__)).parent.glob("*.py"):
        assert "import triton" not in source.read_text()
