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


def test_large_output_passes_and_huge_output_does_not(good: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The cheap look may object to sums of large values; the full look must clear them."""
    out, v = good
    assert what_is_wrong(out.sign() * 9e14, v) is None
    assert what_is_wrong(torch.full_like(out, 9e14).index_fill_(1, torch.tensor(3), 1.0), v) is None
    for value in (3e38, -1e16):
        out[1, 4, 2, 0] = value
        assert what_is_wrong(out, v) == "output above 1e+15 in head 2 of batch entry 1"


def test_a_head_that_is_flat_only_where_sampled_passes() -> None:
    out, v = torch.zeros(1, 640, 1, 4), torch.randn(1, 640, 1, 4)
    out[0, 7] = 1.0  # not on the stride of 10
    assert what_is_wrong(out, v) is None


def test_one_bad_value_in_a_long_sequence_is_found() -> None:
    out, v = torch.randn(1, 6400, 2, 4), torch.randn(1, 6400, 2, 4)
    out[0, 4321, 1, 3] = float("nan")
    assert what_is_wrong(out, v) == "non-finite output in head 1 of batch entry 0"
