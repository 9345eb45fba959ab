"""SeerAttention: a small trained gate predicts which blocks hold the attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..errors import ConfigError
from ..layout import TokenLayout
from .dynamic import DynamicPattern, Heads
from .params import check_share
from .ranking import blocks_of, keep_largest
from .registry import register

__all__ = ["Seer"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Seer(DynamicPattern):
    """Keeps the blocks to which a trained gate gives most weight.

    For each head, P = softmax((W_q mean q_i) . (W_k [max k_j, min k_j, mean k_j]) / sqrt(G)), with G outputs of the
    gate, each projected mean normalised by its RMS if the weights have a scale for that. Source: SeerAttention, made
    for language models; there the gate sees queries and keys before rotary embedding, here as attention gets them.

    Args:
        aim: share of the video blocks that a row keeps, rounded up to whole blocks. Plans call it ``density``.
        threshold: keep every block whose P is above this instead.

    Raises:
        ConfigError: unless exactly one of both is given, above 0 and up to 1.
    """

    name: ClassVar[str] = "seer"
    places = "nothing"

    aim: float | None = field(default=None, metadata={"parameter": "density"})
    threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.aim is None) == (self.threshold is None):
            raise ConfigError(
                f"{self.name}: density is {self.aim!r} and threshold {self.threshold!r}; give one of them"
            )
        for name, value in (("density", self.aim), ("threshold", self.threshold)):
            if value is not None:
                check_share(self.name, name, value)

    @property
    def trained(self) -> tuple[str, ...]:
        return ("seer",)

    def choose(self, heads: Heads) -> torch.Tensor:
        """The largest of each row, or all above the threshold: bool [B,H,NV,NV].

        Raises:
            ConfigError: if the layer has no trained gate.
        """
        video = heads.layout.video_blocks
        logits = _logits(heads)[:, :, video]
        if self.aim is not None:  # the order of the logits is that of P, where P rounds to zero too
            return keep_largest(logits[..., video], blocks_of(self.aim, heads.layout.num_video_blocks))
        assert self.threshold is not None
        return logits.softmax(-1)[..., video] > self.threshold

    def density(self, layout: TokenLayout) -> float | None:
        """Share of the video blocks that a row keeps; ``None`` with a threshold."""
        blocks = layout.num_video_blocks
        return None if self.aim is None else blocks_of(self.aim, blocks) / blocks

    def resolved(self, layout: TokenLayout) -> str:
        """Blocks kept of all, or the threshold."""
        if self.aim is None:
            return f"gates above {self.threshold:g}"
        return f"{blocks_of(self.aim, layout.num_video_blocks)} of {layout.num_video_blocks} blocks a row by the gates"


def _logits(heads: Heads) -> torch.Tensor:
    """What the gate says of every pair of blocks, text included, float32 [B,H,NB,NB]."""
    if "seer.q" not in heads.weights:
        raise ConfigError(
            "seer chooses blocks by a trained gate, and the layer has none; give them as vidaccel.patch(weights=...)"
        )
    of_q, of_k = (heads.weights[name][list(heads.members)].float() for name in ("seer.q", "seer.k"))
    q = torch.einsum("bhnd,hdg->bhng", heads.q_means, of_q)
    k = torch.einsum("bhnd,hdg->bhng", _pooled_keys(heads), of_k)
    q, k = (_normalised(x, heads.weights.get(name)) for x, name in ((q, "seer.q_norm"), (k, "seer.k_norm")))
    return q @ k.mT / math.sqrt(q.shape[-1])


def _pooled_keys(heads: Heads) -> torch.Tensor:
    """Largest, least and mean key of each block, one behind the other, float32 [B,H,NB,3D]."""
    batch, _, count, dim = heads.k.shape
    layout = heads.layout
    k = heads.k.transpose(1, 2).float()
    block = layout.block_of_token.to(k.device)[:, None].expand(k.shape)
    empty = k.new_zeros(batch, count, layout.num_blocks, dim)
    ends = [empty.scatter_reduce(2, block, k, how, include_self=False) for how in ("amax", "amin")]
    return torch.cat([*ends, heads.k_means], dim=-1)


def _normalised(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return x
    return torch.nn.functional.rms_norm(x, x.shape[-1:], scale.float(), eps=1e-6)
