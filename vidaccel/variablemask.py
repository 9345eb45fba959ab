"""Block masks where every head cuts the sequence into blocks of its own, of any size, queries otherwise than keys.

Clusters of tokens are such blocks. The word between patterns and kernels where :class:`~.blockmask.BlockMask`, whose
blocks are the layout's, cannot say it; what SVG2 calls dynamic and FlashInfer variable block sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .errors import LayoutError
from .layout import TokenLayout

__all__ = ["VariableBlockMask", "block_of_token"]


@dataclass(frozen=True, eq=False)
class VariableBlockMask:
    """Which key blocks each query block attends, with the sizes of both.

    Args:
        keep: bool [B,H,MQ,MK].
        q_sizes: int64 [B,H,MQ], tokens of each query block, in the order in which the blocks stand; 0 where a head has
            fewer blocks than others.
        kv_sizes: int64 [B,H,MK], the same of key blocks.

    Raises:
        LayoutError: if shapes or dtypes disagree, the sizes of a side do not add up to one length for all heads, or the
            queries of some block keep no key.
    """

    keep: torch.Tensor
    q_sizes: torch.Tensor
    kv_sizes: torch.Tensor

    def __post_init__(self) -> None:
        keep, q, kv = self.keep, self.q_sizes, self.kv_sizes
        if keep.dim() != 4 or q.shape != keep.shape[:3] or kv.shape != (*keep.shape[:2], keep.shape[3]):
            raise LayoutError(
                f"keep {tuple(keep.shape)}, q_sizes {tuple(q.shape)} and kv_sizes {tuple(kv.shape)} do not fit"
                " together; valid are [B,H,MQ,MK], [B,H,MQ] and [B,H,MK]"
            )
        if keep.dtype != torch.bool or q.dtype != torch.int64 or kv.dtype != torch.int64:
            raise LayoutError(
                f"keep, q_sizes and kv_sizes are {keep.dtype}, {q.dtype} and {kv.dtype}; valid are torch.bool and twice"
                " torch.int64"
            )
        lengths = torch.cat([q.sum(-1).flatten(), kv.sum(-1).flatten()])
        if not keep.numel() or bool((lengths != lengths[0]).any()):
            raise LayoutError(
                f"blocks hold {sorted(set(lengths.tolist()))} tokens; those of every head must hold the whole sequence"
            )
        empty = (self._kept_keys == 0) & (q > 0)
        if bool(empty.any()):
            row = empty.nonzero()[0].tolist()
            raise LayoutError(f"row (batch, head, block) {row} of a block mask keeps no key; every query keeps one")

    def __repr__(self) -> str:
        b, h, q, kv = self.keep.shape
        return f"VariableBlockMask({b}x{h} heads, {q}x{kv} blocks, {float(self.head_density().mean()):.1%} kept)"

    @cached_property
    def tokens(self) -> int:
        """Length of the sequence, S."""
        return int(self.q_sizes[0, 0].sum())

    def is_full(self) -> bool:
        """Whether nothing is dropped."""
        unused = (self.q_sizes == 0)[..., None] | (self.kv_sizes == 0)[..., None, :]
        return bool((self.keep | unused).all())

    def head_density(self) -> torch.Tensor:
        """Kept (query, key) token pairs over all pairs, float64 [B,H] on the CPU."""
        pairs = (self._kept_keys * self.q_sizes).sum(-1)
        return pairs.cpu().double() / self.tokens**2

    def density(self, layout: TokenLayout) -> float:
        """Mean of it over batch and heads."""
        self.check(layout)
        return float(self.head_density().mean())

    def token_mask(self, layout: TokenLayout) -> torch.Tensor:
        """Boolean [B,H,S,S], queries and keys in the order of their blocks: for oracles and small sequences only."""
        self.check(layout)
        return self.pairs()

    def pairs(self) -> torch.Tensor:
        """The same, whatever the layout."""
        kept, columns = self.of_queries(), block_of_token(self.kv_sizes)
        return kept.gather(3, columns[:, :, None].expand(*kept.shape[:3], -1))

    def of_queries(self) -> torch.Tensor:
        """Key blocks that each query token keeps, bool [B,H,S,MK]."""
        rows = block_of_token(self.q_sizes)
        return self.keep.gather(2, rows[..., None].expand(*rows.shape, self.keep.shape[-1]))

    def to(self, device: torch.device | str) -> VariableBlockMask:
        """The same mask on another device."""
        return VariableBlockMask(*(x.to(device) for x in (self.keep, self.q_sizes, self.kv_sizes)))

    def check(self, layout: TokenLayout) -> None:
        """Raises :class:`LayoutError` unless the blocks hold this layout's sequence."""
        if self.tokens != layout.tokens:
            raise LayoutError(
                f"the blocks of the mask hold {self.tokens} tokens, but {layout!r} has {layout.tokens}; build the mask"
                " from this layout"
            )

    @cached_property
    def _kept_keys(self) -> torch.Tensor:
        """Key tokens that each query block keeps, int64 [B,H,MQ]."""
        return (self.keep * self.kv_sizes[..., None, :]).sum(-1)


def block_of_token(sizes: torch.Tensor) -> torch.Tensor:
    """Block of each token, int64 [B,H,S], from the sizes [B,H,M] of blocks that hold S tokens in every head."""
    ends = sizes.cumsum(-1)
    token = torch.arange(int(ends[0, 0, -1]), device=sizes.device).expand(*sizes.shape[:2], -1)
    return torch.searchsorted(ends, token.contiguous(), right=True)
