"""The error table's inputs from the small model: what attention there is really given."""

from __future__ import annotations

import torch

from benchmarks.precision import GRID, LAYERS, NOISE_LEVELS, captured


def test_three_layers_at_three_noise_levels_are_captured() -> None:
    found = captured(torch.Generator().manual_seed(0))
    assert len(found) == len(LAYERS) * len(NOISE_LEVELS)
    for tensors in found:
        assert all(x.shape[:2] == (1, GRID.tokens) and torch.isfinite(x).all() for x in tensors)
    assert not torch.equal(found[0][0], found[1][0])
