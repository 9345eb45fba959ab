"""The self-test of a kernel that is about to serve: every precision, what it must find, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vidaccel.blockmask import BlockMask
from vidaccel.errors import ConfigError, KernelError
from vidaccel.kernels import emulated, torch_sparse
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import FunctionKernel, select
from vidaccel.kernels.selftest import Tested, check_kernel
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, TileShape

CPU = torch.device("cpu")
TILE = TileShape(4, 8, 4)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def request(precision: str = "native", **changes: Any) -> KernelRequest:
    return replace(KernelRequest("cpu", torch.bfloat16, 64, PRECISIONS[precision]), **changes)


def kernel(precision: str, change: Callable[..., Any] = lambda call, *tensors: call(*tensors)) -> FunctionKernel:
    """One that is right but for what ``change(call, q, k, v, layout, mask)`` makes of it."""
    module = torch_sparse if precision == "native" else emulated

    def function(*tensors: Any, **options: Any) -> Any:
        return change(lambda *changed: module.block_sparse_attention(*changed, **options), *tensors)

    return FunctionKernel("made here", function, lambda request: None)


def check(one: FunctionKernel, of: KernelRequest) -> Tested:
    return check_kernel(one, of, CPU, TILE, say=lambda text, end: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_runs_on_a_cpu_is_right(precision: str, dtype: torch.dtype) -> None:
    for tail in (False, True):
        of = request(precision, dtype=dtype, tail=tail, return_lse=True)
        found = check(select(of), of)
        assert found.fresh and found.verdict.passed, found.verdict
        assert len(found.verdict.errors) == 1 + tail


@pytest.mark.parametrize("of", [request(skip=True), request(variable=True), request(variable=True, tail=True)], ids=str)
def test_what_serves_other_kinds_of_calls_is_right(of: KernelRequest) -> None:
    assert check(select(of), of).verdict.passed


def missed(call: Any, q: Any, k: Any, v: Any, layout: Any, mask: BlockMask) -> Any:
    """Leaves out the last block of every list that has more than one: a barrier's off-by-one."""
    return call(q, k, v, layout, BlockMask((mask.kv_num_blocks - 1).clamp(min=1), mask.kv_indices))


def moved(call: Any, q: torch.Tensor, *rest: Any) -> Any:
    """Half of the rows read half of the channels from beyond: what a wrong coordinate of a tile loads."""
    broken, half = q.clone(), q.shape[-1] // 2
    broken[:, q.shape[1] // 2 :, :, :half] = q[:, q.shape[1] // 2 :, :, half:]
    return call(broken, *rest)


def late(call: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    """The values of one block are those of the block before: a buffer read too early."""
    stale = v.clone()
    stale[:, 32:64] = v[:, :32]
    return call(q, k, stale, *rest)


def unwritten(call: Any, *tensors: Any) -> Any:
    out, lse = call(*tensors)
    out[:, -1, 0] = float("nan")
    return out, lse


@pytest.mark.parametrize("change", [missed, moved, late, unwritten], ids=lambda change: change.__name__)
@pytest.mark.parametrize("precision", KERNEL_PRECISIONS)
def test_a_wrong_kernel_is_found(precision: str, change: Callable[..., Any]) -> None:
    found = check(kernel(precision, change), request(precision)).verdict
    assert found.outcome == "wrong" and found.reason is not None


def test_it_runs_once_on_a_machine_and_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def count(call: Any, *tensors: Any) -> Any:
        calls.append(1)
        return call(*tensors)

    one = kernel("native", count)
    first = check_kernel(one, request(), CPU, TILE)
    said = capsys.readouterr().err
    again = check_kernel(one, request(), CPU, TILE)
    assert (first.fresh, again.fresh, len(calls)) == (True, False, 1)
    assert first.verdict == again.verdict
    assert said.startswith("vidaccel: testing kernel made here on ") and said.count("\n") == 1
    assert "(bfloat16, native, 64 channels, blocks of 128)" in said and "right, 0." in said
    assert not capsys.readouterr().err
    check_kernel(one, request(head_dim=128), CPU, TILE)
    check_kernel(one, request(), CPU, TileShape(4, 4, 4))
    assert len(calls) == 3, "another call is another machine program"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (RuntimeError("Failed to find C compiler."), "no C compiler was found"),
        (KernelError("a tile is too long"), "a tile is too long"),
    ],
)
def test_a_kernel_that_does_not_run_is_tried_again_next_time(error: Exception, words: str) -> None:
    errors: list[Exception | None] = [error, None]

    def fail(call: Any, *tensors: Any) -> Any:
        now = errors.pop(0)
        if now is not None:
            raise now
        return call(*tensors)

    one = kernel("native", fail)
    found = check(one, request()).verdict
    assert found.outcome == "untested" and words in str(found)
    assert check(one, request()).verdict.passed


def test_what_is_no_fault_of_the_kernel_is_raised() -> None:
    def fail(*_: Any) -> Any:
        raise ConfigError("an argument is wrong")

    with pytest.raises(ConfigError):
        check(kernel("native", fail), request())

    def kill(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(KernelError, match="left the GPU unusable for this process"):
        check(kernel("native", kill), request())
