"""The first 500 cases of the fuzzer; ``make fuzz`` runs 10,000."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability import fuzz
from tests.reliability.calls import LEFT_OUT, draw_case
from vidaccel.compensation import compensation_names
from vidaccel.kernels import torch_sparse
from vidaccel.patterns import pattern_names
from vidaccel.types import PRECISIONS

pytestmark = pytest.mark.full

CASES, PARTS = 500, 10


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part: int) -> None:
    """In parts, so that they may run side by side; what is printed names the seed and the case."""
    size = CASES // PARTS
    found = [fuzz.failure(0, number) for number in range(part * size, (part + 1) * size)]
    assert not any(found), "\n".join(filter(None, found))


def test_the_cases_cover_what_there_is() -> None:
    """Every pattern, compensation and precision is drawn, so a new one is fuzzed from its first day."""
    cases = [draw_case(0, number) for number in range(CASES)]
    policies = [policy for case in cases for policy in case.policies]
    assert {policy.pattern.name for policy in policies} | set(LEFT_OUT) >= set(pattern_names())
    assert {policy.compensation.name for policy in policies} >= set(compensation_names())
    assert {policy.precision for policy in policies} == set(PRECISIONS)
    assert any(policy.skip for policy in policies)
    assert {case.layout.text_first for case in cases if case.layout.text_tokens} == {True, False}
    assert any(not case.layout.uniform for case in cases) and any(case.layout.num_blocks == 1 for case in cases)


def test_a_case_is_made_from_its_seed_and_number() -> None:
    first, again, other = draw_case(0, 7), draw_case(0, 7), draw_case(1, 7)
    assert str(first) == str(again) != str(other)
    for x, y in zip(first.tensors(1), again.tensors(1), strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


@pytest.mark.parametrize("damage", ["one value", "one row", "unwritten", "lse"])
def test_a_wrong_kernel_is_found(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: small damage in the kernel's output does not pass."""
    real = torch_sparse.attention_with_lse

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = real(*args)
        if damage == "one value":
            out = out.clone()
            out.view(-1)[0] += 0.1
        elif damage == "one row":
            out = out.clone()
            out[..., 0, :] *= 1.05
        elif damage == "unwritten":
            out = torch.empty_like(out)
        else:
            lse = lse + 0.01
        return out, lse

    monkeypatch.setattr(torch_sparse, "attention_with_lse", broken)
    found = [fuzz.failure(0, number) for number in range(30)]
    native = [n for n in range(30) if any(p.precision == "native" and not p.skip for p in draw_case(0, n).policies)]
    assert sum(found[n] is not None for n in native) >= len(native) // 2


def test_the_command_repeats_one_case() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.fuzz", "--seed", "0", "--only", "3"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(draw_case(0, 3))) and "kernel calls compared" in done.stdout
