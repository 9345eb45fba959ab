"""Block means and the pooled tail against loops over the formula."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.kernels.helpers import make_layout
from tests.rounding import assert_rounded, rounding
from vidaccel import pooling
from vidaccel.kernels import tail
from vidaccel.layout import TokenLayout

LAYOUTS = [make_layout(), make_layout((3, 7, 9), text=13, text_first=True)]


def means(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    offsets = layout.block_offsets.tolist()
    return torch.stack([x[:, a:b].double().mean(1) for a, b in itertools.pairwise(offsets)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["even", "ragged"])
def test_block_means(layout: TokenLayout, dtype: torch.dtype) -> None:
    """In float32 also for bf16: a mean of a long block in bf16 would lose its last tokens."""
    x = torch.randn(2, layout.tokens, 5).to(dtype)
    got = pooling.block_means(x, layout)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), means(x, layout), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 40, 1 << 22])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["even", "ragged"])
def test_pooled_tail(layout: TokenLayout, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cut of the rows: sum over the skipped blocks of n_j exp(scale q.kmean_j), one row at a time."""
    monkeypatch.setattr(tail, "_MAX_LOGITS", cut)
    n, scale = 3, 0.4
    k, v = torch.randn(2, n, layout.tokens, 6).unbind(0)
    q = torch.randn(n, 11, 6)
    kept = torch.rand(n, layout.num_blocks) < 0.5
    kept[:, 0] = False
    log_sizes = pooling.log_block_sizes(layout, q.device)
    bias = torch.where(kept, -math.inf, log_sizes)
    got, lse = tail.pooled_tail(q, pooling.block_means(k, layout), pooling.block_means(v, layout), bias, scale)
    k_means, v_means = means(k, layout), means(v, layout)
    allowed = rounding(*(x.unsqueeze(2) for x in (q, k, v)), scale)
    for i in range(n):
        for row in range(11):
            total, summed = 0.0, torch.zeros(6, dtype=torch.float64)
            for j, size in enumerate(layout.block_sizes.tolist()):
                if not kept[i, j]:
                    weight = size * math.exp(scale * float(q[i, row].double() @ k_means[i, j]))
                    total, summed = total + weight, summed + weight * v_means[i, j]
            assert_rounded(got[i, row], summed / total, allowed.out)
            assert abs(lse[i, row].item() - math.log(total)) <= allowed.lse
