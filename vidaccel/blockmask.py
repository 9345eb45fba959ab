"""Which key blocks each query block of each head attends.

The only word between patterns and kernels, in FlexAttention's terms: ``kv_num_blocks`` counts the key blocks of a
query block, ``kv_indices`` lists them. Rows always keep at least one block, because a softmax over nothing is NaN.
A mask may carry a rule over tokens (:class:`~.axisrule.AxisRule`), which cuts some of the kept blocks: the partial
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .axisrule import AxisRule
from .errors import LayoutError
from .layout import TokenLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

__all__ = ["BlockMask", "block_lists"]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Block-sparse attention mask. Make it with :meth:`from_dense`, :meth:`full` or :meth:`from_flex`.

    Args:
        kv_num_blocks: int32 [B, H, Q], key blocks kept by each query block; B or H may be 1 and then broadcast.
        kv_indices: int32 [B, H, Q, K], the kept key blocks in ascending order, first ``kv_num_blocks`` entries
            valid, the rest 0. K is the number of all key blocks.
        rule: which token pairs of the kept blocks are kept, for all heads or for each of H; ``None`` keeps all.

    Raises:
        LayoutError: if the shapes or dtypes disagree, or a row is empty or too long.
    """

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    rule: AxisRule | None = None

    def __post_init__(self) -> None:
        counts, indices = self.kv_num_blocks, self.kv_indices
        if counts.dim() != 3 or indices.dim() != 4 or indices.shape[:3] != counts.shape:
            raise LayoutError(
                f"kv_num_blocks {tuple(counts.shape)} and kv_indices {tuple(indices.shape)} do not fit together;"
                " valid are [B,H,Q] and [B,H,Q,K]"
            )
        if counts.dtype != torch.int32 or indices.dtype != torch.int32:
            raise LayoutError(f"block lists are {counts.dtype} and {indices.dtype}; valid is torch.int32 for both")
        if counts.numel() == 0:
            return
        least, most = (int(n) for n in torch.aminmax(counts))
        if least < 1:
            row = (counts < 1).nonzero()[0].tolist()
            raise LayoutError(f"row (batch, head, block) {row} of a block mask is empty; every row keeps a block")
        if most > indices.shape[-1]:
            raise LayoutError(
                f"a row of a block mask lists {most} key blocks, but there are {indices.shape[-1]}; list each once"
            )
        if self.rule is not None:
            self.check(self.rule.layout)
            if self.rule.heads not in (1, counts.shape[1]):
                raise LayoutError(
                    f"a rule over tokens for {self.rule.heads} heads does not fit a block mask of {counts.shape[1]};"
                    " give one rule, or one for each head"
                )

    def __repr__(self) -> str:
        b, h, q, k = self.shape
        partial = "" if self.rule is None else f", {int(self.partial.sum())} of them partial"
        return f"BlockMask({b}x{h} heads, {q}x{k} blocks, {self.block_density:.1%} kept{partial})"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, query blocks, key blocks)."""
        b, h, q, k = self.kv_indices.shape
        return b, h, q, k

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.kv_indices.device

    # -- making -------------------------------------------------------------------------------------------------

    @staticmethod
    def from_dense(keep: torch.Tensor, rule: AxisRule | None = None) -> BlockMask:
        """From a boolean [Q,K], [H,Q,K] or [B,H,Q,K] tensor of kept block pairs.

        Args:
            rule: which token pairs of them are kept, ``None`` for all. Block pairs in which it keeps nothing are
                dropped. Where it cuts none of the kept blocks the mask carries no rule.

        Raises:
            LayoutError: if ``keep`` has another shape or dtype, leaves a row empty, or leaves out a block in which
                the rule keeps a token pair.
        """
        if keep.dtype != torch.bool or keep.dim() not in (2, 3, 4):
            raise LayoutError(
                f"a block mask needs a boolean tensor of 2 to 4 axes, found {keep.dtype} {tuple(keep.shape)}"
            )
        keep = keep.reshape((1,) * (4 - keep.dim()) + keep.shape)
        if rule is not None:
            keep = _touched(keep, rule)
            rule = rule if bool((keep & rule.cut.to(keep.device)).any()) else None
        counts, indices = block_lists(keep)
        mask = BlockMask(counts, indices, rule)
        mask.__dict__["dense"] = keep.clone()  # what the cached property would find out again from the lists
        return mask

    @staticmethod
    def full(layout: TokenLayout) -> BlockMask:
        """Every block attends every block."""
        n = layout.num_blocks
        return BlockMask.from_dense(torch.ones(n, n, dtype=torch.bool, device=layout.device))

    @staticmethod
    def stack(masks: Sequence[BlockMask], layout: TokenLayout) -> BlockMask:
        """One mask whose head h is the only head of ``masks[h]``.

        Raises:
            LayoutError: if a mask has more heads, another batch size than the first, or another layout.
        """
        for mask in masks:
            mask.check(layout)
            if mask.shape[:2] != (masks[0].shape[0], 1):
                raise LayoutError(
                    f"a mask of {mask.shape[0]}x{mask.shape[1]} (batch x heads) cannot be stacked over heads; each"
                    f" needs {masks[0].shape[0]}x1"
                )
        keep = torch.cat([mask.dense for mask in masks], dim=1)
        ruled = any(mask.rule is not None for mask in masks)
        return BlockMask.from_dense(keep, AxisRule.stack([mask.rule for mask in masks], layout) if ruled else None)

    @staticmethod
    def from_flex(mask: FlexBlockMask) -> BlockMask:
        """From FlexAttention's mask; its partial blocks are rounded out to whole blocks."""
        return BlockMask.from_dense(mask.to_dense().bool())

    # -- reading ------------------------------------------------------------------------------------------------

    @cached_property
    def dense(self) -> torch.Tensor:
        """Kept block pairs as a boolean [B,H,Q,K] tensor."""
        columns = torch.arange(self.shape[-1], device=self.device)
        valid = columns < self.kv_num_blocks.unsqueeze(-1)
        # unused slots repeat the row's first block, which is kept anyway: no row is empty
        index = torch.where(valid, self.kv_indices, self.kv_indices[..., :1])
        keep = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return keep.scatter_(-1, index.long(), True)

    @cached_property
    def partial(self) -> torch.Tensor:
        """Kept block pairs that the rule cuts, bool [B,H,Q,K]; none without a rule."""
        return torch.zeros_like(self.dense) if self.rule is None else self.dense & self.rule.cut.to(self.device)

    @property
    def block_density(self) -> float:
        """Kept block pairs over all block pairs, whatever the blocks' sizes; partial ones count whole."""
        return float(self.kv_num_blocks.sum()) / max(1, self.kv_indices.numel())

    def head_density(self, layout: TokenLayout) -> torch.Tensor:
        """Kept (query, key) token pairs over all pairs, float64 [B, H]."""
        self.check(layout)
        if self.rule is not None:
            kept = self.dense * self.rule.counts.to(self.device)
            return kept.sum((-1, -2)).double() / layout.tokens**2
        sizes = layout.block_sizes.to(self.device)
        # float32 is exact here, as no row holds more than 2^24 keys, and takes half the memory
        keys = self.dense.float() @ sizes.float()
        return keys.double() @ sizes.double() / layout.tokens**2

    def density(self, layout: TokenLayout) -> float:
        """Mean over batch and heads of the kept token pairs: by tokens, because edge blocks are shorter."""
        return float(self.head_density(layout).mean())

    def is_full(self) -> bool:
        """Whether nothing is dropped."""
        return self.rule is None and int(self.kv_num_blocks.min()) == self.shape[-1]

    def token_mask(self, layout: TokenLayout) -> torch.Tensor:
        """Boolean [B,H,S,S] in layout order: for oracles and small sequences only."""
        self.check(layout)
        block = layout.block_of_token.to(self.device)
        tokens = self.dense[:, :, block][:, :, :, block]
        return tokens if self.rule is None else tokens & self.rule.token_mask().to(self.device)

    def check(self, layout: TokenLayout) -> None:
        """Raises :class:`LayoutError` unless the mask has this layout's blocks."""
        if self.shape[2:] != (layout.num_blocks, layout.num_blocks):
            raise LayoutError(
                f"the block mask has {self.shape[2]}x{self.shape[3]} blocks, but {layout!r} has"
                f" {layout.num_blocks}; build the mask from this layout"
            )
        if self.rule is not None and not self.rule.fits(layout):
            raise LayoutError(
                f"the block mask has a rule over the tokens of {self.rule.layout!r}, not of {layout!r}; build the mask"
                " from this layout"
            )

    def of_heads(self, heads: slice) -> BlockMask:
        """The mask of some heads; itself if one serves all."""
        if self.shape[1] == 1:
            return self
        rule = None if self.rule is None else self.rule.of_heads(heads)
        return BlockMask(self.kv_num_blocks[:, heads], self.kv_indices[:, heads], rule)

    # -- combining ----------------------------------------------------------------------------------------------

    def union(self, other: BlockMask) -> BlockMask:
        """Blocks that either mask keeps; batch and head axes broadcast.

        Raises:
            LayoutError: if the masks have different blocks, or one has a rule over tokens: the union of two rules
                does not factor over the axes.
        """
        if self.rule is not None or other.rule is not None:
            raise LayoutError("masks with a rule over tokens cannot be united; round the rule out to whole blocks")
        if self.shape[2:] != other.shape[2:]:
            raise LayoutError(
                f"cannot unite masks of {self.shape[2:]} and {other.shape[2:]} blocks; build both from one layout"
            )
        return BlockMask.from_dense(self.dense | other.dense)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device; itself, with what is cached for it, if it is there already."""
        if torch.device(device) == self.device:
            return self
        return BlockMask(self.kv_num_blocks.to(device), self.kv_indices.to(device), self.rule)

    def to_flex(self, layout: TokenLayout) -> FlexBlockMask:
        """FlexAttention's mask over tokens in layout order.

        Blocks that a rule cuts are partial blocks, all others full ones. The mask function says the same of every
        token pair, because uncompiled FlexAttention reads nothing else.

        Raises:
            LayoutError: if the layout's blocks differ in size, which FlexAttention cannot express.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        self.check(layout)
        if not layout.uniform:
            sizes = sorted(set(layout.block_sizes.tolist()))
            raise LayoutError(
                f"FlexAttention needs blocks of one size, but {layout!r} has sizes {sizes}; choose a tile that divides"
                " the grid, and no text tokens or a multiple of the tile"
            )
        size = int(layout.block_sizes[0])
        keep, (batch, heads, _, _) = self.dense, self.shape
        partial, rule = self.partial, self.rule
        tokens = None if rule is None else rule.token_mask().to(self.device)

        def keeps(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            kept = keep[b if batch > 1 else 0, h if heads > 1 else 0, q // size, k // size]
            return kept if tokens is None else kept & tokens[h if len(tokens) > 1 else 0, q, k]

        return FlexBlockMask.from_kv_blocks(
            *block_lists(partial),
            *block_lists(keep & ~partial),
            BLOCK_SIZE=(size, size),
            mask_mod=keeps,
            seq_lengths=(layout.tokens, layout.tokens),
        )


def block_lists(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts int32 [B,H,Q] and ascending lists int32 [B,H,Q,K] of the kept pairs, behind them 0."""
    counts = keep.sum(-1, dtype=torch.int32)
    columns = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device)
    kept = keep.reshape(-1).nonzero().squeeze(-1).remainder_(keep.shape[-1]).to(torch.int32)
    # kept columns and free slots come in the same row order, so one scatter fills every row from the left
    indices = torch.zeros(keep.shape, dtype=torch.int32, device=keep.device)
    return counts, indices.masked_scatter_(columns < counts.unsqueeze(-1), kept)


def _touched(keep: torch.Tensor, rule: AxisRule) -> torch.Tensor:
    """Kept block pairs [B,H,Q,K] in which the rule keeps something, expanded to the heads of the rule."""
    touched = rule.touched.to(keep.device)
    if keep.shape[2:] != touched.shape[1:] or (rule.heads > 1 and keep.shape[1] not in (1, rule.heads)):
        raise LayoutError(
            f"kept blocks {tuple(keep.shape)} do not fit a rule for {rule.heads} heads over {touched.shape[1]} blocks;"
            " build both from one layout"
        )
    if bool((touched & ~keep).any()):
        *_, row, column = (touched & ~keep).nonzero()[0].tolist()
        raise LayoutError(
            f"the rule keeps token pairs of blocks ({row}, {column}), which the block mask drops; keep every block that"
            " the rule touches"
        )
    return keep & touched
