"""Every compensation with the Triton kernel under it gives what it gives with the oracle under it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.compensation.calls import call_of, random_blocks
from tests.kernels.helpers import make_layout
from tests.patterns.calls import make_call
from vidaccel.compensation import Compensation, CompensationToken, Delta, MergedKeys, Rectification, Rettention
from vidaccel.kernels.triton.launch import launch
from vidaccel.patterns import Heads

RULES = [CompensationToken(), Delta(queries=2), MergedKeys(parts=4), Rectification(), Rettention(period=5)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_kernel_under_it_does_not_matter(rule: Compensation) -> None:
    """Two steps, so that what is left behind by the first is used, in float32 with text before a ragged video."""
    layout = make_layout((3, 7, 6), (2, 4, 4), text=13, text_first=True)
    call = make_call(layout, batch=1, heads=2)
    call = replace(call, **{x: getattr(call, x).float() for x in "qkv"}, memory={})
    exact = replace(call, **{x: getattr(call, x).double() for x in "qkv"}, memory={})
    blocks = random_blocks(layout, batch=1, heads=2)
    found, expected = _steps(rule, call, blocks, launch), _steps(rule, exact, blocks)
    for out, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(out.double(), oracle, rtol=1e-4, atol=2e-5)


def _steps(rule: Compensation, heads: Heads, blocks: torch.Tensor, *kernel: Any) -> list[torch.Tensor]:
    memory: dict[str, Any] = {}
    calls = [replace(call_of(replace(heads, step=step), blocks, *kernel), memory=memory) for step in (3, 4)]
    return [rule.attend(call) for call in calls]
