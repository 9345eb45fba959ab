"""Every candidate's output from shared block sums, against the oracle that computes each candidate by itself."""

from __future__ import annotations

import pytest
import torch

from vidaccel.blockmask import BlockMask
from vidaccel.calibration.evaluate import Row, evaluate
from vidaccel.kernels.reference import block_sparse_attention
from vidaccel.layout import TokenLayout
from vidaccel.types import PRECISIONS, TileShape, VideoGrid

LAYOUTS = {
    "ragged": TokenLayout.of(VideoGrid(3, 5, 7), TileShape(2, 3, 4)),
    "uniform": TokenLayout.of(VideoGrid(4, 4, 4), TileShape(2, 2, 2)),
    "text": TokenLayout.of(VideoGrid(3, 4, 4), TileShape(2, 2, 2), text_tokens=11, text_first=True),
}


def inputs(layout: TokenLayout, heads: int = 3, channels: int = 16) -> tuple[torch.Tensor, ...]:
    # means that differ from block to block, so that a forgotten tail shows
    base = torch.randn(3, layout.num_blocks, heads, channels).repeat_interleave(layout.block_sizes, dim=1)
    return tuple(base + 0.5 * torch.randn(3, layout.tokens, heads, channels))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_equal_those_of_the_oracle(name: str, precision: str) -> None:
    layout = LAYOUTS[name]
    q, k, v = inputs(layout)
    heads, n = q.shape[1], layout.num_blocks
    keep = torch.rand(4, heads, n, n) < 0.5
    keep |= torch.eye(n, dtype=torch.bool)
    keep[0] = True
    blocks = [0, n // 2, n - 1]
    tail = torch.tensor([False, True, False, True])
    root = torch.randn(heads, 5, q.shape[-1])
    metric = root.mT @ root
    (scores,) = evaluate(q, k, v, layout, blocks, [Row(PRECISIONS[precision], keep[:, :, blocks], tail)], metric=metric)

    rows = torch.cat([torch.arange(*layout.block_offsets[b : b + 2].tolist()) for b in blocks])
    exact = block_sparse_attention(q[None], k[None], v[None], layout, BlockMask.full(layout), out_dtype=torch.float64)
    assert isinstance(exact, torch.Tensor)
    assert scores.tokens == len(rows)
    projected = torch.einsum("shd,hed->she", exact[0, rows], root.double())
    torch.testing.assert_close(scores.energy, projected.square().sum((0, 2)), rtol=1e-4, atol=0)
    for c in range(4):
        mask = BlockMask.from_dense(keep[c])
        out = block_sparse_attention(
            q[None], k[None], v[None], layout, mask, precision=PRECISIONS[precision], tail=bool(tail[c]),
            out_dtype=torch.float64,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        apart = out[0, rows] - exact[0, rows]
        expected = torch.einsum("shd,hed->she", apart, root.double()).square().sum((0, 2))
        # P of fp8 or int8 is rounded relative to another maximum, which moves each weight by at most one rounding step
        loose = PRECISIONS[precision].pv in ("fp8", "int8")
        torch.testing.assert_close(scores.error[c], expected, rtol=0.25 if loose else 2e-3, atol=1e-6)
        cosine = torch.nn.functional.cosine_similarity(out[0, rows], exact[0, rows], dim=-1).sum(0)
        torch.testing.assert_close(scores.cosine[c], cosine, rtol=1e-2 if loose else 1e-4, atol=0)
        token_mask = mask.token_mask(layout)[0][:, rows].double()
        logits = torch.einsum("qhd,khd->hqk", q[rows].double(), k.double()) / q.shape[-1] ** 0.5
        torch.testing.assert_close(scores.mass[c], (logits.softmax(-1) * token_mask).sum((1, 2)), rtol=1e-4, atol=0)
        torch.testing.assert_close(scores.pairs[c], token_mask.sum((1, 2)))


def test_a_mask_for_all_heads_and_a_native_full_candidate() -> None:
    layout = LAYOUTS["ragged"]
    q, k, v = inputs(layout)
    everything = torch.ones(1, 1, 2, layout.num_blocks, dtype=torch.bool)
    (scores,) = evaluate(q, k, v, layout, [0, 3], [Row(PRECISIONS["native"], everything, torch.tensor([True]))])
    assert float(scores.error.max()) <= 1e-9 * float(scores.energy.min())
    torch.testing.assert_close(scores.mass, torch.full((1, 3), float(scores.tokens), dtype=torch.float64))
