"""The Hopper kernel in Gluon, executed as PTX: the cases of the self-test that a GPU has to pass before it is used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.triton.ptx.emulator import Emulator
from vidaccel.kernels.selftest import CASES, Case, examine
from vidaccel.kernels.triton.hopper_launch import attend_into

ARCHES = (90,)
REPRESENTATIVE = (90,)
_RAGGED = {"grid": (3, 7, 9), "tile": (3, 6, 5), "text": 13}
SMALL = [
    Case("bf16 ragged tail", **_RAGGED, densities=(0.4,), tail=True, head_dim=64),
    Case("fp8 ragged tail", **_RAGGED, densities=(0.4,), tail=True, head_dim=64, precision="fp8-tile"),
    Case("fp16 uniform", (4, 8, 8), (4, 8, 4), (1.0,), dtype=torch.float16),
]


def passes(case: Case, emulator: Emulator) -> None:
    """Its own verdict is good; and, since its fences are written by hand, each must be where it has to be."""
    emulator.proxies = "error"
    found = examine(attend_into, torch.device("cpu"), [case])
    assert found.passed, found.reason


@pytest.mark.representative
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_cases(case: Case, emulator: Emulator) -> None:
    passes(case, emulator)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_of_the_self_test(case: Case, emulator: Emulator) -> None:
    """Batches of two in one of them, for time."""
    passes(case if case == CASES[0] else replace(case, batch=1), emulator)
