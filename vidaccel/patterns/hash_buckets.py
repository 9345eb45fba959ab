"""Locality-sensitive hashing: blocks attend each other if many of their queries and keys fall into one bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .budgeted import BudgetedPattern
from .dynamic import Heads
from .params import check_count
from .ranking import keep_largest
from .registry import register

__all__ = ["HashBuckets"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class HashBuckets(BudgetedPattern):
    """Each row keeps the k blocks whose keys share most buckets with its queries.

    A token's bucket is the number that the signs of ``bits`` random projections spell; two tokens at an angle a share
    it with probability (1 - a/pi)^bits. Blocks i and j score the number of (query, key) pairs in one bucket over
    n_i * n_j, averaged over ``rounds`` independent hashes; of equal scores the larger mean query . mean key wins.

    Source: the hashing of HyperAttention and AnnSA. Different here: they sort tokens by bucket and attend within
    buckets; here tokens stay in their tiles and whole tiles are chosen. K's mean over the sequence is left out, because
    the softmax does not see it.

    Args:
        bits: projections of a hash, 1 to 10.
        rounds: independent hashes.
        seed: of the projections, which are the same in every call.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "hash_buckets"
    places = "nothing"

    bits: int = 6
    rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("bits", "rounds"):
            check_count(self.name, field, getattr(self, field))
        if self.bits > 10:
            raise ConfigError(f"{self.name}: bits is {self.bits!r}; give 1 to 10")
        check_count(self.name, "seed", self.seed, 0)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The k blocks of each row with most shared buckets, bool [B,H,NV,NV]."""
        video = heads.layout.video_blocks
        mean = heads.k.mean(1, keepdim=True, dtype=torch.float32)
        q, k = (self.histogram(x, heads.layout)[:, :, video] for x in (heads.q, heads.k - mean))
        sizes = heads.sizes[video]
        shared = q @ k.mT / (self.rounds * sizes[:, None] * sizes)
        order = heads.pooled_logits[:, :, video, video].argsort(dim=-1, descending=True, stable=True)
        kept = keep_largest(shared.gather(-1, order), self.count(heads.layout))  # stable: ties stay in this order
        return torch.zeros_like(kept).scatter_(-1, order, kept)

    def histogram(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Tokens of each block in each bucket of each round, float32 [B,H,NB,rounds * 2^bits] of [B,S,H,D]."""
        b, tokens, h, dim = x.shape
        bins = self.rounds * 2**self.bits
        signs = torch.einsum("bshd,drn->bhsrn", x.float(), self.planes(dim).to(x.device)) > 0
        bucket = (signs * 2 ** torch.arange(self.bits, device=x.device)).sum(-1)
        rounds = torch.arange(self.rounds, device=x.device) * 2**self.bits
        first = layout.block_of_token.to(x.device)[:, None] * bins + rounds
        counted = torch.ones(1, 1, 1, device=x.device).expand(b, h, tokens * self.rounds)
        found = torch.zeros(b, h, layout.num_blocks * bins, device=x.device)
        return found.scatter_add_(-1, (first + bucket).flatten(2), counted).view(b, h, -1, bins)

    def planes(self, dim: int) -> torch.Tensor:
        """The projections, float32 [D, rounds, bits] on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(dim, self.rounds, self.bits, generator=generator)

    def resolved(self, layout: TokenLayout) -> str:
        """Blocks kept of all, and the hashes."""
        return f"{super().resolved(layout)} by {self.rounds} hashes of {self.bits} bits"
