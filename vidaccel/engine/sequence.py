"""Where the video sits in a layer's sequence, and how many of the other tokens are valid.

Kernels take the video in layout order with the other tokens (text, history, reference frames) as one segment behind
or before it, and no padding. This is the way there and back. Attention does not care in which order keys come, so
tokens on both sides of the video are simply collected behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..layout import TokenLayout
from ..types import TileShape, VideoGrid

__all__ = ["Part", "Sequence", "padding_of", "parts_of"]


@dataclass(frozen=True)
class Sequence:
    """A layer's valid tokens in the order in which the model has them.

    Args:
        grid: the video's token grid.
        tile: tile shape of the plan, or ``None`` to let the layout choose.
        tokens: valid tokens, the video's included.
        before: how many of them precede the video.
        tiled: whether the video's tokens are in layout order already.
    """

    grid: VideoGrid
    tile: TileShape | None
    tokens: int
    before: int
    tiled: bool

    @property
    def others(self) -> int:
        """Tokens that are not video."""
        return self.tokens - self.grid.tokens

    def layout(self, device: torch.device) -> TokenLayout:
        """The layout that kernels see."""
        # without a reordering the other tokens stay before the video, if all of them are there
        first = self.tiled and self.before == self.others
        return TokenLayout.of(self.grid, self.tile, text_tokens=self.others, text_first=first, device=device)

    def to_layout(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] in the model's order -> in layout order."""
        index = _gather(self, x.device)
        return x if index is None else x.index_select(1, index)

    def from_layout(self, x: torch.Tensor) -> torch.Tensor:
        """The way back, exactly."""
        index = _scatter(self, x.device)
        return x if index is None else x.index_select(1, index)


@lru_cache(maxsize=64)
def _gather(sequence: Sequence, device: torch.device) -> torch.Tensor | None:
    """Position in the model's order of each token in layout order; ``None`` where they are the same."""
    layout = sequence.layout(device)
    if sequence.tiled and (layout.text_first or sequence.before == 0):
        return None
    every = torch.arange(sequence.tokens, device=device)
    behind = sequence.before + sequence.grid.tokens
    collected = torch.cat([every[sequence.before : behind], every[: sequence.before], every[behind:]])
    return collected if sequence.tiled else collected[layout.order]


@lru_cache(maxsize=64)
def _scatter(sequence: Sequence, device: torch.device) -> torch.Tensor | None:
    index = _gather(sequence, device)
    return None if index is None else torch.argsort(index)


@dataclass(frozen=True, eq=False)
class Part:
    """Samples of a batch with equally many valid tokens.

    Args:
        samples: int64 [n] on the tokens' device, or ``None`` for the whole batch.
        share: part of the batch.
        valid: leading tokens that are not padding.
    """

    samples: torch.Tensor | None
    share: float
    valid: int

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Its samples and valid tokens of x [B, S, H, D]."""
        x = x[:, : self.valid]
        return x if self.samples is None else x.index_select(0, self.samples)


def parts_of(lengths: tuple[int, ...], device: torch.device) -> tuple[Part, ...]:
    """The samples grouped by their number of valid tokens."""
    members: dict[int, list[int]] = {}
    for sample, length in enumerate(lengths):
        members.setdefault(length, []).append(sample)
    if len(members) == 1:
        return (Part(None, 1.0, lengths[0]),)
    return tuple(
        Part(torch.tensor(samples, device=device), len(samples) / len(lengths), length)
        for length, samples in members.items()
    )


def padding_of(mask: torch.Tensor, batch: int, tokens: int) -> tuple[int, ...] | str:
    """Valid tokens of each sample by a mask of keys, or one phrase on why the mask is more than padding at the end.

    Reads the mask back from the device, so ask once a forward pass.

    Args:
        mask: bool [B, 1, 1, S] or [B, S], or [B, n] for the last n tokens; one row serves a whole batch.
    """
    if mask.dtype != torch.bool and (mask.is_floating_point() or mask.dim() != 2):
        return f"the model passed an attention mask of {str(mask.dtype).removeprefix('torch.')} weights"
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] > tokens:
        return f"the model passed an attention mask of shape {list(mask.shape)}, with rules of its own for each query"
    valid = mask.bool().cpu()
    counts = valid.sum(dim=1)
    if not torch.equal(valid, torch.arange(valid.shape[1]) < counts[:, None]):
        return "the model's attention mask leaves out tokens that are not at the end of the sequence"
    lengths = (counts + tokens - mask.shape[1]).tolist()
    return tuple(lengths * batch if len(lengths) == 1 else lengths)
