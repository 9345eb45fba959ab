"""Layouts, masks and tolerances that the kernel tests share."""

from __future__ import annotations

import itertools
import math

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.layout import TokenLayout
from vidaccel.types import TileShape, VideoGrid


def make_layout(
    grid: tuple[int, int, int] = (4, 8, 8),
    tile: tuple[int, int, int] = (2, 4, 4),
    text: int = 0,
    text_first: bool = False,
) -> TokenLayout:
    """A layout from plain tuples."""
    return TokenLayout.of(VideoGrid(*grid), TileShape(*tile), text_tokens=text, text_first=text_first)


def random_mask(layout: TokenLayout, batch: int, densities: list[float]) -> BlockMask:
    """A head per density; every row keeps its own block, so that none is empty."""
    n = layout.num_blocks
    keep = torch.rand(batch, len(densities), n, n) < torch.tensor(densities)[:, None, None]
    return BlockMask.from_dense(keep | torch.eye(n, dtype=torch.bool))


def random_qkv(
    layout: TokenLayout, batch: int = 1, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B,S,H,D]; k and v have a mean, as real ones do."""
    q, k, v = (torch.randn(batch, layout.tokens, heads, dim) + shift for shift in (0.0, 0.7, 0.3))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask, tail: bool = False
) -> torch.Tensor:
    """Dense masked attention [B,S,H,D] in the inputs' own dtype, written out by hand; its error is our yardstick."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = (q @ k.mT * scale).masked_fill(~mask.token_mask(layout), -math.inf)
    if tail:
        blocks = list(itertools.pairwise(layout.block_offsets.tolist()))
        k_means, v_means = (torch.stack([x[..., a:b, :].mean(-2) for a, b in blocks], dim=-2) for x in (k, v))
        kept = mask.dense[:, :, layout.block_of_token]
        logits = q @ k_means.mT * scale + layout.block_sizes.log().to(q.dtype)
        scores = torch.cat([scores, logits.masked_fill(kept, -math.inf)], dim=-1)
        v = torch.cat([v, v_means], dim=-2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def assert_as_good_as_eager(got: torch.Tensor, low_precision: torch.Tensor, exact: torch.Tensor) -> None:
    """Both errors are against the float64 oracle; twice the eager one is allowed, and some units of rounding."""
    assert got.dtype == low_precision.dtype and got.shape == exact.shape
    error = (got.double() - exact).abs()
    allowed = (low_precision.double() - exact).abs()
    unit = torch.finfo(got.dtype).eps * exact.abs().max()
    assert error.max() <= 2 * allowed.max() + 2 * unit, f"{error.max():.2e} against {allowed.max():.2e}"
    assert error.mean() <= 2 * allowed.mean() + unit / 4, f"{error.mean():.2e} against {allowed.mean():.2e}"
