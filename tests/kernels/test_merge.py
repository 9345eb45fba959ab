"""Merging two partial results against attention over both key sets at once."""

from __future__ import annotations

import math

import pytest
import torch

from vidaccel.kernels.merge import merge


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("shift", [0.0, 60.0, -60.0], ids=["alike", "first wins", "second wins"])
def test_merge_is_attention_over_the_union(shift: float) -> None:
    q, k0, k1 = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 4))
    v0, v1 = torch.randn_like(k0), torch.randn_like(k1)
    q[..., 0], k0[..., 0], k1[..., 0] = 1.0, shift, 0.0
    out, lse = merge(*attention(q, k0, v0), *attention(q, k1, v1))
    want, want_lse = attention(q, torch.cat([k0, k1], -2), torch.cat([v0, v1], -2))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_an_empty_side_counts_for_nothing() -> None:
    out0, out1 = torch.randn(3, 4), torch.randn(3, 4)
    lse = torch.tensor([1.0, -2.0, 3e4])
    none = torch.full((3,), -math.inf)
    for merged in (merge(out0, lse, out1, none), merge(out1, none, out0, lse)):
        assert torch.equal(merged[0], out0) and torch.equal(merged[1], lse)


def test_two_empty_sides_stay_empty() -> None:
    none = torch.full((3,), -math.inf)
    out, lse = merge(torch.zeros(3, 4), none, torch.ones(3, 4), none)
    assert torch.equal(out, torch.zeros(3, 4)) and torch.equal(lse, none)
