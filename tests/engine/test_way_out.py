"""A kernel that raises does not end a generation: another one computes the same call, or the call runs dense."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vidaccel
from tests.rounding import assert_rounded, bound_of_case
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.errors import ConfigError, KernelError, StrictError
from vidaccel.kernels import dispatch, failures
from vidaccel.kernels.dispatch import FunctionKernel
from vidaccel.kernels.failures import in_words, or_else

CASE = CASES[0]
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])


# what Triton raises, where it is not installed: the classes' names are what tells them apart
class PTXASError(Exception):
    pass


class OutOfResources(Exception):
    pass


class CompilationError(Exception):
    pass


#: Every kind of failure: what is raised, and how the report says it.
FAILURES: dict[str, tuple[Exception, str]] = {
    "no C compiler": (
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs."),
        "no C compiler was found for its launcher; install gcc, or set CC",
    ),
    "no gcc": (
        FileNotFoundError(2, "No such file or directory", "/usr/bin/gcc"),
        "no C compiler was found for its launcher; install gcc, or set CC",
    ),
    "C compiler fails": (
        subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-O3"]),
        "gcc ended with code 1",
    ),
    "ptxas": (
        PTXASError("PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n..."),
        "ptxas refused its program: PTXAS error: Internal Triton PTX codegen error",
    ),
    "illegal instruction at compile time": (
        RuntimeError("ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"),
        "ptxas refused its program: ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'",
    ),
    "out of resources": (
        OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 101376."),
        "it needs more than one multiprocessor has: out of resource: shared memory, Required: 262144, Hardware limit:"
        " 101376.",
    ),
    "does not compile": (
        CompilationError("at 3:4:\n    x = tl.dot(a, b)\n    ^\nUnsupported conversion from fp8e4nv to fp16"),
        "it does not compile: Unsupported conversion from fp8e4nv to fp16",
    ),
    "out of memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.20 GiB."), "out of memory"),
    "out of host memory": (MemoryError(), "out of memory"),
    "driver": (
        RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
        "RuntimeError: Triton Error [CUDA]: no kernel image is available for execution on the device",
    ),
    "launcher": (
        ImportError("/root/.triton/cache/launcher.so: undefined symbol: cuLaunchKernelEx"),
        "ImportError: /root/.triton/cache/launcher.so: undefined symbol: cuLaunchKernelEx",
    ),
    "the kernel's own": (KernelError("a tile's edges are 70 tokens"), "KernelError: a tile's edges are 70 tokens"),
    "a bug": (IndexError("list index out of range"), "IndexError: list index out of range"),
}


def plan(precision: str = "native", pattern: PatternSpec = WINDOW) -> Plan:
    return Plan("test", (Rule(LayerPolicy((HeadPolicy(pattern, precision=precision),))),), tile=TileShape(2, 2, 2))


class Raising:
    """A kernel that raises in the calls that ``when`` picks, counted from 1, and else computes."""

    def __init__(self, error: Exception, when: Callable[[int], bool] = lambda call: True) -> None:
        self.error, self.when, self.calls = error, when, 0

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        self.calls += 1
        if self.when(self.calls):
            raise self.error
        return dispatch.torch_sparse.block_sparse_attention(*tensors, **options)


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, bool], None]:
    """Puts a kernel before the others, or in place of all."""

    def put(function: Any, alone: bool = False) -> None:
        first = FunctionKernel("fast", function, lambda request: None)
        monkeypatch.setattr(dispatch, "_KERNELS", (first, *(() if alone else dispatch._KERNELS)))

    return put


def ran(made: Plan, **options: Any) -> tuple[torch.Tensor, vidaccel.Report]:
    pipe = CASE.make()
    session = vidaccel.patch(pipe, made, **options)
    return CASE.run(pipe), session.report()


@pytest.mark.parametrize("kind", FAILURES)
def test_the_next_kernel_takes_over(put: Callable[..., None], kind: str) -> None:
    expected, plain = ran(plan())
    error, told = FAILURES[kind]
    kernel = Raising(error)
    put(kernel)
    found, report = ran(plan())
    assert torch.equal(found, expected)
    assert report.kernels == plain.kernels and report.density == plain.density
    assert report.fallbacks == {f"kernel fast failed ({told}), torch-sparse takes its place": report.calls}
    assert kernel.calls == 1, "it is tried once for each request"
    assert told in str(report)


@pytest.mark.parametrize("kind", FAILURES)
def test_without_another_kernel_it_runs_dense(put: Callable[..., None], kind: str) -> None:
    dense = CASE.run(CASE.make())
    error, told = FAILURES[kind]
    put(Raising(error), alone=True)
    found, report = ran(plan())
    assert_rounded(found, dense, bound_of_case(CASE))  # tokens in tile order: another order of sums
    assert report.kernels == {"dense": report.calls}
    [reason] = report.fallbacks
    assert f"fast: failed ({told})" in reason and report.fallbacks[reason] == report.calls


@pytest.mark.parametrize("kind", FAILURES)
def test_a_strict_session_raises(put: Callable[..., None], kind: str) -> None:
    error, told = FAILURES[kind]
    put(Raising(error))
    with pytest.raises(StrictError) as raised:
        ran(plan(), strict=True)
    assert told in str(raised.value)


def test_a_kernel_may_fail_in_the_middle(put: Callable[..., None]) -> None:
    expected, _ = ran(plan())
    put(Raising(RuntimeError("late"), lambda call: call == 5))
    found, report = ran(plan())
    assert torch.equal(found, expected)
    assert report.kernels == {"fast": 4, "torch-sparse": report.calls - 4}
    assert sum(report.fallbacks.values()) == report.calls - 4


def test_the_named_kernel_is_not_replaced_by_one_that_was_not_named(put: Callable[..., None]) -> None:
    dense = CASE.run(CASE.make())
    put(Raising(RuntimeError("no")))
    found, report = ran(plan(), kernel="fast")
    assert_rounded(found, dense, bound_of_case(CASE))
    assert report.kernels == {"dense": report.calls}


def test_a_precision_that_no_other_kernel_computes_is_dropped_with_both_reasons(put: Callable[..., None]) -> None:
    expected, _ = ran(plan())
    kernel = Raising(RuntimeError("no fp8 here"), lambda call: call == 1)
    put(kernel)
    dispatch._KERNELS = dispatch._KERNELS[:1] + tuple(k for k in dispatch._KERNELS[1:] if k.name != "emulated")
    found, report = ran(plan(precision="int8"))
    assert torch.equal(found, expected)
    [reason] = report.fallbacks
    assert "precision int8 ran in the model's own dtype" in reason and "failed (RuntimeError: no fp8 here)" in reason
    assert report.kernels == {"fast": report.calls}, "in the model's own dtype it was not tried before"


def test_memory_is_tried_again_in_the_next_run(put: Callable[..., None]) -> None:
    kernel = Raising(torch.OutOfMemoryError("CUDA out of memory."), lambda call: call == 1)
    put(kernel)
    pipe = CASE.make()
    session = vidaccel.patch(pipe, plan())
    CASE.run(pipe)
    assert session.report().kernels == {"torch-sparse": 12}
    session.reset_stats()
    CASE.run(pipe)
    report = session.report()
    assert report.kernels == {"fast": 12} and not report.fallbacks


def test_what_planning_cannot_allocate_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidaccel.patterns.dynamic import DynamicPattern
    from vidaccel.patterns.registry import build_pattern

    spec = PatternSpec.make("pooled_top_k", density=0.3)
    pattern = type(build_pattern(spec))
    assert issubclass(pattern, DynamicPattern)

    def starve(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(pattern, "mask", starve)
    found, report = ran(plan(pattern=spec))
    assert_rounded(found, CASE.run(CASE.make()), bound_of_case(CASE))
    assert report.fallbacks == {"planning failed (out of memory)": report.calls}
    with pytest.raises(StrictError, match="out of memory"):
        ran(plan(pattern=spec), strict=True)


def test_a_broken_device_is_said_to_be_broken(put: Callable[..., None]) -> None:
    """Dense attention would raise as well, and be blamed."""
    put(Raising(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")))
    with pytest.raises(KernelError, match=r"kernel fast left the GPU unusable .* start it again with another kernel"):
        ran(plan())


def test_a_fault_of_the_call_is_not_taken_for_the_kernels(put: Callable[..., None]) -> None:
    put(Raising(ConfigError("the mask has 3 heads")))
    with pytest.raises(ConfigError, match="3 heads"):
        ran(plan())


def test_threads_share_what_failed(put: Callable[..., None]) -> None:
    expected, _ = ran(plan())
    put(Raising(RuntimeError("no")))
    pipe = CASE.make()
    session = vidaccel.patch(pipe, plan())
    others = [CASE.make(), CASE.make()]
    for other in others:
        other.transformer = pipe.transformer
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda other=other: found.append(CASE.run(other))) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(one, expected) for one in found)
    assert "fast" not in session.report().kernels


# -- kernels that have a twin in torch --------------------------------------------------------------------------------


@pytest.fixture
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_FAILED", {})


def test_a_twin_takes_over_and_the_layer_counts_it(nothing_failed: None) -> None:
    tried: list[int] = []

    def fast(x: int) -> int:
        tried.append(x)
        raise RuntimeError("no")

    run = or_else("k-means", "here", fast, lambda x: x + 1)
    told: list[str] = []
    with failures.told_to(told.append):
        assert run(1) == 2 and run(2) == 3
    assert tried == [1]
    assert told == ["kernel k-means failed (RuntimeError: no), torch takes its place"] * 2
    with pytest.warns(vidaccel.VidaccelWarning, match="k-means failed"):
        run(3)


def test_a_twin_is_tried_again_when_memory_was_short(nothing_failed: None) -> None:
    errors = [MemoryError(), None]

    def fast() -> str:
        error = errors.pop(0)
        if error:
            raise error
        return "fast"

    run = or_else("means", "here", fast, lambda: "plain")
    with failures.told_to(lambda reason: None):
        assert [run(), run()] == ["plain", "fast"]


@pytest.mark.parametrize("message", ["", "x" * 500])
def test_words_are_short(message: str) -> None:
    assert 0 < len(in_words(RuntimeError(message))) < 230
