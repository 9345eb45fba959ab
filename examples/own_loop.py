"""Attention by a plan in a denoising loop written by hand, without diffusers.

python examples/own_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

import vidaccel

GRID = (8, 12, 16)  # frames, height and width of the video in tokens


class Block(nn.Module):
    """One layer of a transformer as you may have it."""

    def __init__(self, dim: int = 96, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, attention: vidaccel.Attention, noise_level: float, layer: int) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)) for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = attention(q, k, v, grid=GRID, noise_level=noise_level, layer=layer)
        return x + self.out(y.flatten(2))  # type: ignore[no-any-return]


@torch.no_grad()
def main() -> None:
    """Eight steps of six layers: dense while the noise is strongest, then a sliding window of tiles."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block() for _ in range(6)])
    x = torch.randn(1, 8 * 12 * 16, 96)
    attention = vidaccel.Attention("sta")
    for step in range(8):
        noise_level = 1 - step / 8
        y = x
        for layer, block in enumerate(blocks):
            y = block(y, attention, noise_level, layer)
        x = x - (y - x) / 8
    print(attention.report())


if __name__ == "__main__":
    main()
