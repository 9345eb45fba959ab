"""Calls over blocks of variable size."""

from __future__ import annotations

import math

import torch

from vidaccel.variablemask import VariableBlockMask, block_of_token

__all__ = ["eager_variable", "random_sizes", "random_variable"]


def random_sizes(batch: int, heads: int, tokens: int, blocks: int) -> torch.Tensor:
    """Sizes of blocks that hold all tokens of every head, int64 [B,H,M]; some of them hold none."""
    labels = torch.randint(0, blocks, (batch, heads, tokens))
    return torch.stack([row.bincount(minlength=blocks) for row in labels.flatten(0, 1)]).view(batch, heads, blocks)


def random_variable(
    batch: int = 1,
    heads: int = 2,
    tokens: int = 40,
    blocks: tuple[int, int] = (4, 7),
    density: float = 0.4,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, VariableBlockMask]:
    """q, k, v [B,S,H,D] and a mask in which every query keeps its head's largest key block."""
    rows, columns = (random_sizes(batch, heads, tokens, n) for n in blocks)
    keep = torch.rand(batch, heads, *blocks) < density
    keep |= (columns == columns.amax(-1, keepdim=True))[:, :, None]
    q, k, v = (torch.randn(batch, tokens, heads, dim) + shift for shift in (0.0, 0.7, 0.3))
    return q.to(dtype), k.to(dtype), v.to(dtype), VariableBlockMask(keep, rows, columns)


def eager_variable(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: VariableBlockMask, *, tail: bool = False
) -> torch.Tensor:
    """Dense masked attention [B,S,H,D] in the inputs' own dtype; its error is our yardstick."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    rows, columns = block_of_token(mask.q_sizes), block_of_token(mask.kv_sizes)
    kept = torch.stack([keep[at] for keep, at in zip(mask.keep.flatten(0, 1), rows.flatten(0, 1), strict=True)])
    pairs = torch.stack([keep[:, at] for keep, at in zip(kept, columns.flatten(0, 1), strict=True)])
    scores = (q @ k.mT * scale).masked_fill(~pairs.view(*rows.shape, -1), -math.inf)
    if tail:
        sizes = mask.kv_sizes.clamp(min=1)[..., None]
        member = torch.nn.functional.one_hot(columns, mask.kv_sizes.shape[-1]).mT.to(q.dtype)
        k_means, v_means = ((member @ x / sizes).to(q.dtype) for x in (k, v))
        logits = q @ k_means.mT * scale + mask.kv_sizes.log().to(q.dtype)[..., None, :]
        scores = torch.cat([scores, logits.masked_fill(kept.view(*rows.shape, -1), -math.inf)], dim=-1)
        v = torch.cat([v, v_means], dim=-2)
    return (scores.softmax(-1) @ v).transpose(1, 2)
