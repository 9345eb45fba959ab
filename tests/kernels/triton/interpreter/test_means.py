"""Block statistics on the interpreter, against float64 formulas written out."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.helpers import make_layout
from vidaccel.errors import LayoutError
from vidaccel.kernels.triton.means import append_means, block_ranges, block_statistics, sequence_mean
from vidaccel.layout import TokenLayout

RAGGED = {"grid": (3, 5, 6), "tile": (2, 4, 4)}
EPS = torch.finfo(torch.float32).eps


def blocks_of(x: torch.Tensor, layout: TokenLayout) -> list[torch.Tensor]:
    """[B,H,n,D] of each block in float64."""
    return [x[:, a:b].double().transpose(1, 2) for a, b in itertools.pairwise(layout.block_offsets.tolist())]


def sample(layout: TokenLayout, batch: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B,S,H,D] with neither contiguous channels nor contiguous rows, and a mean."""
    return (torch.randn(dim, batch, heads, layout.tokens) + 0.5).to(dtype).permute(1, 3, 2, 0)


def rounding(x: torch.Tensor, layout: TokenLayout) -> float:
    """How far a float32 sum of a block's rows, divided by their number, may be off: n roundings of at most max |x|."""
    return float(layout.block_sizes.max()) * EPS * float(x.abs().max())


CASES = [
    (RAGGED, 0, 2, 2, 32, torch.bfloat16),
    (RAGGED, 13, 1, 1, 96, torch.float32),
    ({"grid": (2, 8, 8), "tile": (2, 8, 8)}, 0, 1, 2, 64, torch.float16),
    ({"grid": (3, 7, 11), "tile": (3, 7, 11)}, 5, 1, 1, 20, torch.float32),
]


@pytest.mark.parametrize(("shape", "text", "batch", "heads", "dim", "dtype"), CASES)
def test_statistics(shape: dict, text: int, batch: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    layout = make_layout(**shape, text=text)
    x = sample(layout, batch, heads, dim, dtype)
    found = block_statistics(x, layout)
    expected = blocks_of(x, layout)
    mean = torch.stack([rows.mean(-2) for rows in expected], dim=2)
    assert found.mean.shape == (batch, heads, layout.num_blocks, dim) and found.mean.dtype == torch.float32
    assert (found.mean - mean).abs().max() <= rounding(x, layout)
    assert torch.equal(found.largest.double(), torch.stack([rows.abs().amax((-2, -1)) for rows in expected], dim=2))
    unit = [torch.nn.functional.normalize(rows, dim=-1) for rows in expected]
    cosine = torch.stack([(rows @ rows.mT).mean((-2, -1)) for rows in unit], dim=2)
    # vectors of length 1 are added: n + D roundings of numbers up to 1
    torch.testing.assert_close(found.similarity.double(), cosine, atol=(dim + 64) * EPS, rtol=0)


@pytest.mark.representative
@pytest.mark.parametrize(("shape", "text", "batch", "heads", "dim", "dtype"), CASES[:2])
def test_ranges(shape: dict, text: int, batch: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    layout = make_layout(**shape, text=text)
    x = sample(layout, batch, heads, dim, dtype)
    found = block_ranges(x, layout)
    expected = blocks_of(x, layout)
    assert torch.equal(found.low.double(), torch.stack([rows.amin(-2) for rows in expected], dim=2))
    assert torch.equal(found.high.double(), torch.stack([rows.amax(-2) for rows in expected], dim=2))
    mean = sequence_mean(found.mean, layout)
    assert (mean - x.double().mean(1)).abs().max() <= rounding(x, layout)
    # the maximum over rows to the last bit, from the extremes alone
    around = torch.stack(
        [(x[:, a:b].float() - mean[:, None]).abs().amax(1) for a, b in itertools.pairwise(layout.block_offsets)], dim=2
    )
    assert torch.equal(found.largest_around(mean.unsqueeze(-2)), around)


@pytest.mark.representative
def test_zeros_and_tokens_alike() -> None:
    """Blocks of one vector have similarity 1 at any size of its elements; zeros have none."""
    layout = make_layout((3, 4, 4), (1, 4, 4))
    x = torch.randn(64).expand(1, layout.tokens, 1, 64).clone()
    x[:, 16:32] *= 1e-30  # its square is below float32's smallest number
    x[:, 32:] = 0
    found = block_statistics(x, layout)
    torch.testing.assert_close(found.similarity[0, 0], torch.tensor([1.0, 1.0, 0.0]), atol=80 * EPS, rtol=0)
    assert found.largest[0, 0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_means_behind_a_copy(dtype: torch.dtype) -> None:
    layout = make_layout(**RAGGED, text=13)
    x = sample(layout, 2, 3, 20, dtype)
    wide = torch.full((2, layout.tokens + layout.num_blocks + 1, 3, 24), torch.nan, dtype=dtype)
    out = append_means(x, layout, wide[:, :-1, :, :20])
    assert torch.equal(out[:, : layout.tokens], x)
    mean = torch.stack([rows.mean(-2) for rows in blocks_of(x, layout)], dim=1)
    allowed = rounding(x, layout) + float(mean.abs().max()) * torch.finfo(dtype).eps / 2
    assert (out[:, layout.tokens :] - mean).abs().max() <= allowed
    assert wide[..., 20:].isnan().all() and wide[:, -1].isnan().all()


def test_another_layout_is_refused() -> None:
    with pytest.raises(LayoutError, match="tile x to this layout"):
        block_statistics(torch.zeros(1, 5, 1, 16), make_layout())
