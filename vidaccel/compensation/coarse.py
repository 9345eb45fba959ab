"""VSA's coarse branch: attention between block means, added to the sparse output through a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..errors import ConfigError
from ..patterns.dynamic import Heads
from .base import Call, Compensation
from .registry import register

__all__ = ["Coarse"]


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Coarse(Compensation):
    """O = O_sparse + g * O_coarse, where O_coarse = softmax(scale * qmean_i . kmean_j) vmean_j.

    i and j run over the video's blocks, and all tokens of block i get the same O_coarse. The gate g is a linear map of
    what the layer's projections took, one value for each token and channel. It starts training at zero, so without
    trained weights the output is that of the kept blocks. Text tokens come out as the kernel made them.

    Source: Video Sparse Attention (VSA), whose self-attention holds no text.

    Args:
        gate: one number for all, which needs no weights; ``None`` for the trained gate.

    Raises:
        ConfigError: unless the gate is a finite number or ``None``.
    """

    name: ClassVar[str] = "coarse"
    always: ClassVar[bool] = True

    gate: float | None = None

    def __post_init__(self) -> None:
        # what a plan holds is finite already
        if self.gate is not None and (isinstance(self.gate, bool) or not isinstance(self.gate, int | float)):
            raise ConfigError(
                f"{self.name}: gate is {self.gate!r}; give a number, or leave it out for the trained gate"
            )

    @property
    def trained(self) -> tuple[str, ...]:
        return ("gate",) if self.gate is None else ()

    @property
    def neutral(self) -> bool:
        return self.gate is None

    @property
    def needs_hidden(self) -> bool:
        return self.gate is None

    def attend(self, call: Call) -> torch.Tensor:
        """The sparse output, and the gated coarse one on top of it.

        Raises:
            ConfigError: if there is a trained gate but nobody gave what it takes.
        """
        out = call.sparse()
        heads = call.heads
        gate = heads.q.new_tensor(self.gate) if self.gate is not None else _gate(heads)
        if gate is None:
            return out
        layout = heads.layout
        call.add_pairs((layout.num_video_blocks / layout.tokens) ** 2)
        video = layout.video_tokens
        added = _coarse(heads) * (gate if gate.dim() == 0 else gate[:, video])
        if added.shape == out.shape:
            return out + added
        out = out.clone()
        out[:, video] += added
        return out


def _coarse(heads: Heads) -> torch.Tensor:
    """Attention between the video's block means, for each video token, [B,SV,H,D] in the dtype of q."""
    layout = heads.layout
    video = layout.video_blocks
    weights = heads.pooled_logits[:, :, video, video].softmax(-1)
    coarse = (weights @ heads.v_means[:, :, video]).to(heads.q.dtype).transpose(1, 2)
    block = layout.block_of_token[layout.video_tokens].to(coarse.device) - video.start
    return coarse.index_select(1, block)


def _gate(heads: Heads) -> torch.Tensor | None:
    """The trained gate of every token and channel, [B,S,H,D]; ``None`` without weights."""
    weight = heads.weights.get("gate.weight")
    if weight is None:
        return None
    if heads.hidden is None:
        raise ConfigError(
            "coarse has a trained gate, but nobody gave it what the layer's projections took; call the layer through"
            " its attention module, or set gate to a number"
        )
    dim = heads.q.shape[-1]
    bias = heads.weights.get("gate.bias")
    if heads.members != tuple(range(weight.shape[0] // dim)):
        rows = torch.tensor(heads.members, device=weight.device)
        weight = weight.unflatten(0, (-1, dim))[rows].flatten(0, 1)
        bias = None if bias is None else bias.unflatten(0, (-1, dim))[rows].flatten()
    kind = heads.hidden.dtype
    gate = F.linear(heads.hidden, weight.to(kind), None if bias is None else bias.to(kind))
    gate = gate.unflatten(-1, (-1, dim)).to(heads.q.dtype)
    if heads.order is None:
        return gate
    index = heads.order.q.expand(gate.shape[0], gate.shape[2], -1).transpose(1, 2)[..., None]
    return gate.gather(1, index.expand(gate.shape))
