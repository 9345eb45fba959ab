"""SALE: a 4-bit estimate of every score, measured against the part of the softmax that is surely large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import TokenLayout
from .anchor import anchor_blocks
from .dynamic import DynamicPattern, Heads
from .params import check_count, check_share
from .rectangles import block_rows, largest_per_block
from .registry import register

__all__ = ["Sale", "round_to_int4"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Sale(DynamicPattern):
    """Each row keeps the blocks with a score whose estimated weight reaches ``threshold`` for one of its queries.

    For a query, m and l are the maximum and the sum of exp(s - m) of its exact scores s with a part: its own block
    (local), the first block of the video (sink), and text. The other scores are estimated, s', from q and k rounded to
    4 bits; block j is kept if max exp(s' - m) / l >= threshold over the row's queries and the block's keys. The part is
    kept too. Source: SALE. Different here: k's mean over the sequence is left out of the rounding and added exactly;
    one rounding scale for each token; a row may look at some of its queries only; and the 4-bit product is computed in
    floating point, so this says how well the estimate chooses, not how fast it could be.

    Args:
        threshold: least weight relative to the part (published: halved per layer until an error target holds).
        rows: queries of each block that are looked at, evenly spaced; ``None`` for all, as published.

    Raises:
        ConfigError: if a number is out of range.
    """

    name: ClassVar[str] = "sale"
    places = "order"

    threshold: float = 0.01
    rows: int | None = None

    def __post_init__(self) -> None:
        check_share(self.name, "threshold", self.threshold)
        if self.rows is not None:
            check_count(self.name, "rows", self.rows)

    def choose(self, heads: Heads) -> torch.Tensor:
        """Blocks of enough estimated weight, the own one and the first one, bool [B,H,NV,NV]."""
        layout, device = heads.layout, heads.q.device
        video = layout.video_blocks
        positions = block_rows(layout, self.rows, device)[video]
        q = heads.q.index_select(1, positions.flatten()).transpose(1, 2).float() * heads.scale
        mean = heads.k.mean(1, keepdim=True, dtype=torch.float32)
        shift = q @ mean.permute(0, 2, 3, 1)
        rounded = round_to_int4(heads.k - mean)
        weight = largest_per_block(round_to_int4(q), rounded, layout) + shift
        weight = (weight - self._log_total(heads, q, positions).unsqueeze(-1)).unflatten(2, positions.shape).amax(3)
        always = anchor_blocks(layout, device)
        return ((weight >= torch.tensor(self.threshold).log()) | always)[..., video]

    def _log_total(self, heads: Heads, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """m + log l of each query, float32 [B,H,NV*R]: scores with the first block and text, and with the own block."""
        layout, device = heads.layout, heads.q.device
        first = layout.video_blocks.start
        of_token = layout.block_of_token.to(device)
        shared = ((of_token == first) | ~_is_video(layout, of_token)).nonzero().squeeze(-1)
        common = q @ heads.k.index_select(1, shared).permute(0, 2, 3, 1).float()

        own = block_rows(layout, None, device)[layout.video_blocks]
        keys = heads.k.index_select(1, own.flatten()).transpose(1, 2).float().unflatten(2, own.shape)
        local = q.unflatten(2, positions.shape) @ keys.mT
        # a short block is listed with repeated tokens, and the first block is among the shared ones already
        sizes = layout.block_sizes.to(device)[layout.video_blocks, None]
        listed = torch.arange(own.shape[1], device=device) < sizes
        listed[0] = False
        local = local.masked_fill(~listed[:, None], -torch.inf).logsumexp(-1).flatten(2)
        return torch.logaddexp(common.logsumexp(-1), local)

    def resolved(self, layout: TokenLayout) -> str:
        """The threshold and the queries."""
        rows = "all queries" if self.rows is None else f"{self.rows} queries a block"
        return f"estimated weight from {self.threshold:g} of own block, first block and text, {rows}"


def round_to_int4(x: torch.Tensor) -> torch.Tensor:
    """``x`` as 4-bit numbers would hold it, float32: whole numbers from -7 to 7 times a scale for each token."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
    return (x / scale).round() * scale


def _is_video(layout: TokenLayout, block: torch.Tensor) -> torch.Tensor:
    return (block >= layout.video_blocks.start) & (block < layout.video_blocks.stop)
