"""The guard finds output that would turn a video black, and leaves right output alone."""

from __future__ import annotations

import pytest
import torch

from vidaccel.engine.guard import what_is_wrong


@pytest.fixture
def good() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 17, 3, 8, generator=generator), torch.randn(2, 17, 3, 8, generator=generator)


def test_good_output_passes(good: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert what_is_wrong(*good) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_found(good: tuple[torch.Tensor, torch.Tensor], value: float) -> None:
    out, v = good
    out[1, 5, 2, 3] = value
    assert what_is_wrong(out, v) == "non-finite output in head 2 of batch entry 1"


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_flat_head_is_found(good: tuple[torch.Tensor, torch.Tensor], value: float) -> None:
    out, v = good
    out[0, :, 1] = value
    assert what_is_wrong(out, v) == "flat output in head 1 of batch entry 0"


def test_attention_over_constant_values_may_be_flat(good: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, v = good
    out[0, :, 1], v[0, :, 1] = 3.0, 3.0
    assert what_is_wrong(out, v) is None


def test_one_token_is_not_flat() -> None:
    assert what_is_wrong(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)) is None
