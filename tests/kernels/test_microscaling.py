"""NVFP4 and channel scaling: values, groups, and what must cancel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.errors import KernelError
from vidaccel.kernels.channels import channel_factors, scale_channels
from vidaccel.kernels.microscaling import round_e2m1, round_e4m3, round_nvfp4, round_rows_in_two_levels

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

finite = st.floats(-8, 8, width=32)


@given(st.lists(finite, min_size=1, max_size=40))
def test_e2m1_is_the_nearest_of_eight(values: list[float]) -> None:
    for x, found in zip(values, round_e2m1(torch.tensor(values)).tolist(), strict=True):
        distance = abs(abs(found) - min(abs(x), 6.0))
        assert abs(found) in E2M1 and distance == min(abs(one - min(abs(x), 6.0)) for one in E2M1)
        assert found == 0 or (found < 0) == (x < 0)


def test_e2m1_ties_go_to_the_even_mantissa() -> None:
    between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -2.5])
    assert round_e2m1(between).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -2.0]


def test_e4m3_saturates() -> None:
    assert round_e4m3(torch.tensor([500.0, -1e9, 0.3])).tolist() == [448.0, -448.0, 0.3125]


@given(st.integers(1, 70), st.floats(-4, 4))
@settings(max_examples=60)
def test_nvfp4_error_is_half_a_step_of_its_own_group(length: int, exponent: float) -> None:
    """Steps are at most 2 of 6 wide, and the scale is off by at most 1/16: so 1/6 of the largest, and 1/16 more.

    Below 2^-6, the smallest normal E4M3, scales are multiples of 2^-9, which adds 6 half steps of them.
    """
    x = torch.randn(3, length, dtype=torch.float64) * 10.0**exponent
    x = x.clamp(-2600, 2600)
    found = round_nvfp4(x)
    assert found.shape == x.shape and found.dtype == torch.float32
    for i in range(0, length, 16):
        part = x[:, i : i + 16]
        largest = part.abs().amax(-1, keepdim=True)
        assert bool(((found[:, i : i + 16] - part).abs() <= largest * (1 / 6 + 1 / 16) + 6 * 2.0**-10).all())
    # a group does not see its neighbours
    again = round_nvfp4(torch.cat([x[:, :16], 7 * x[:, 16:]], dim=-1))
    assert torch.equal(again[:, :16], found[:, :16])


@given(st.integers(1, 70), st.floats(1e-30, 1.0))
@settings(max_examples=60)
def test_two_levels_do_not_mind_the_size_of_a_row(length: int, size: float) -> None:
    """A row's largest weight is kept exactly, up to float32, however small the row is against its maximum so far."""
    p = torch.rand(4, length) * size
    found = round_rows_in_two_levels(p)
    largest, where = p.max(-1, keepdim=True)
    torch.testing.assert_close(found.gather(-1, where), largest, rtol=1e-6, atol=0)
    assert bool((found >= 0).all()) and bool(((found - p).abs() <= largest / 4).all())


def test_empty_rows_stay_empty() -> None:
    assert torch.equal(round_rows_in_two_levels(torch.zeros(2, 20)), torch.zeros(2, 20))
    assert torch.equal(round_nvfp4(torch.zeros(2, 20)), torch.zeros(2, 20))
    assert round_nvfp4(torch.full((1, 16), 1e-6)).abs().max() == 0  # the scale is below the smallest E4M3


@pytest.mark.parametrize("scaling", ["pairs", "channels"])
def test_scaling_keeps_the_product_and_evens_the_ranges(scaling: str) -> None:
    q, k = (torch.randn(2, 3, 50, 8, dtype=torch.float64) * torch.logspace(a, -a, 8) for a in (1.0, 0.5))
    q[..., 4:6] = 0  # nothing to even out
    scaled_q, scaled_k = scale_channels(q, k, scaling)  # type: ignore[arg-type]
    torch.testing.assert_close(scaled_q @ scaled_k.mT, q @ k.mT)
    assert torch.equal(scaled_k[..., 4:6], k[..., 4:6])
    if scaling == "channels":
        ranges = [x.abs().amax(-2)[..., [0, 1, 2, 3, 6, 7]] for x in (scaled_q, scaled_k)]
    else:
        ranges = [x.unflatten(-1, (4, 2)).norm(dim=-1).amax(-2)[..., [0, 1, 3]] for x in (scaled_q, scaled_k)]
    torch.testing.assert_close(ranges[0], ranges[1], rtol=1e-5, atol=0)
    assert scale_channels(q, k, "none") == (q, k)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turns channels 2i and 2i+1 of x [S,D] by angles [S,D/2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_pairs_are_scaled_alike_before_and_after_the_rotary_embedding() -> None:
    q, k = (torch.randn(40, 12, dtype=torch.float64) * torch.logspace(-1, 1, 12) for _ in range(2))
    angles = torch.rand(40, 6, dtype=torch.float64) * 6
    before = channel_factors(q, k, "pairs")
    torch.testing.assert_close(channel_factors(rotate(q, angles), rotate(k, angles), "pairs"), before)
    torch.testing.assert_close(rotate(q * before, angles), rotate(q, angles) * before)
    one_each = channel_factors(q, k, "channels")
    assert not torch.allclose(rotate(q * one_each, angles), rotate(q, angles) * one_each, rtol=0.1)


def test_an_odd_channel_has_no_partner() -> None:
    with pytest.raises(KernelError, match="5 channels cannot be scaled by pairs"):
        scale_channels(torch.ones(1, 5), torch.ones(1, 5), "pairs")
