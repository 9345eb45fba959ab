"""The repair of the interpreter: everything it is for comes out right with it, and wrong or not at all without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.triton.interpreter.probes import PROBES

#: Right without the repair as well: fp8 products are decoded, int8 ones only slow; 3.9 has mended two more.
RIGHT_IN_STOCK = {
    "3.6": {"dot_of_e4m3", "dot_of_int8"},
    "3.9": {"dot_of_e4m3", "dot_of_int8", "constant_in_bf16", "loop_to_loaded_bound"},
}


@pytest.mark.representative
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_right_when_repaired(probe: Callable[[], bool]) -> None:
    assert probe()


@pytest.mark.representative
@pytest.mark.parametrize("version", [pytest.param(v, marks=pytest.mark.triton(v)) for v in RIGHT_IN_STOCK])
def test_the_stock_interpreter_needs_it(version: str) -> None:
    """A newer Triton in which this fails needs less repair: take it out."""
    root = Path(__file__).parents[4]
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.interpreter.probes"],
        cwd=root, capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    results = json.loads(run.stdout.splitlines()[-1])
    assert {name for name, result in results.items() if result == "right"} == RIGHT_IN_STOCK[version], results


@triton.jit
def _plus_one(x):
    return x + 1


@triton.jit
def _count_up(out, N: tl.constexpr):
    total = tl.load(out)
    for _ in range(N):
        total = _plus_one(total)
    tl.store(out, total)


@pytest.mark.representative
def test_device_functions_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The language is patched once a launch, however often a device function is called, and not left patched."""
    calls = []
    stock, before = interpreter._patch_builtin, tl.load
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: calls.append(args) or stock(*args))
    counts = []
    for n in (1, 20):
        out = torch.zeros(1, dtype=torch.int32)
        calls.clear()
        _count_up[(3,)](out, n)
        counts.append(len(calls))
        assert out.item() == 3 * n and tl.load is before
    assert counts[0] == counts[1] > 0
