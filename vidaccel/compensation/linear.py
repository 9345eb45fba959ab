"""The linear branch of SLA and SLA2: linear attention that stands in for, or beside, the blocks that are skipped.

O_l = phi(q) N / (phi(q) . Z + 1e-5),   N = sum_j phi(k_j)^T v_j,   Z = sum_j phi(k_j)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..errors import ConfigError, LayoutError
from ..layout import TokenLayout
from ..patterns.dynamic import Heads
from .base import Call, Compensation
from .registry import register

__all__ = ["Linear"]

#: Feature maps phi of q and k.
_FEATURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}
_FORMS = ("all", "complement")
_EPSILON = 1e-5
#: Largest float32 intermediate of one round over heads, in numbers.
_CHUNK = 1 << 26


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class Linear(Compensation):
    """Sparse attention beside linear attention, joined by a trained projection or by a weight.

    With ``alpha=None``, O = O_sparse + W O_l + b, where W and b belong to the layer and start training at zero: without
    trained weights the output is that of the kept blocks. Else O = a O_sparse + (1 - a) O_l with a in [0, 1]; where
    nothing is left to the linear branch, a is 1. Text tokens come out as the kernel made them.

    Source: SLA (sparse-linear attention): its code is form "all" with a projection; its paper is form "complement" with
    the lowest tenth skipped. SLA2 is form "complement" with ``alpha="trained"``, which starts training at .9.

    Args:
        features: phi, over the channels of a head: ``softmax``, ``elu`` (+ 1) or ``relu``.
        form: whether the sums run over ``all`` tokens, or for each block over the ``complement`` of what it keeps.
        skipped: of the complement, leave out this share of the video blocks: those of lowest softmax between means.
        alpha: a number in [0, 1], ``"trained"`` for the layer's own of each head and block, or ``None``.

    Raises:
        ConfigError: if a parameter is none of these, or ``skipped`` is set with form "all".
    """

    name: ClassVar[str] = "linear"
    always: ClassVar[bool] = True

    features: str = "softmax"
    form: str = "all"
    skipped: float = 0.0
    alpha: float | str | None = None

    def __post_init__(self) -> None:
        for field, value, valid in (("features", self.features, tuple(_FEATURES)), ("form", self.form, _FORMS)):
            if value not in valid:
                raise ConfigError(f"{self.name}: {field} is {value!r}; valid are {', '.join(valid)}")
        if not _number(self.skipped) or not 0 <= self.skipped < 1 or (self.skipped and self.form == "all"):
            raise ConfigError(
                f"{self.name}: skipped is {self.skipped!r}; give a share from 0 up to, not including, 1, above 0 only"
                " with form complement"
            )
        fixed = _number(self.alpha) and 0 <= self.alpha <= 1  # type: ignore[operator]
        if self.alpha not in (None, "trained") and not fixed:
            raise ConfigError(f"{self.name}: alpha is {self.alpha!r}; give a number in [0, 1], 'trained' or nothing")

    @property
    def trained(self) -> tuple[str, ...]:
        if self.alpha is None:
            return ("projection",)
        return ("alpha",) if self.alpha == "trained" else ()

    @property
    def neutral(self) -> bool:
        return self.alpha is None

    def attend(self, call: Call) -> torch.Tensor:
        """The sparse output, joined with the linear one.

        Raises:
            ConfigError: if ``alpha`` is trained and the layer has none.
            LayoutError: if it was trained for another number of blocks.
        """
        out = call.sparse()
        heads, layout = call.heads, call.heads.layout
        if self.alpha is None and "projection.weight" not in heads.weights:
            return out
        alpha = None if self.alpha is None else self._alpha(heads)
        # pairs of the same number of multiplications: phi(k)^T v and phi(q) N
        call.add_pairs(heads.q.shape[-1] / layout.tokens)
        marginal = self._marginal(call) if self.form == "complement" else None
        video = layout.video_tokens
        result = out.clone()
        for b, h in _chunks(heads, marginal is not None):
            branch = _linear(heads, _FEATURES[self.features], marginal, b, h)[:, video]
            sparse = out[b, video, h].transpose(0, 1).to(branch.dtype)
            if alpha is None:
                joined = sparse + _projected(heads, branch)
            else:
                share = alpha[h][:, video, None]
                if marginal is not None:
                    used = _part(marginal, b, h).any(-1)[:, layout.block_of_token[video].to(marginal.device), None]
                    share = torch.where(used, share, 1.0)
                joined = share * sparse + (1 - share) * branch
            result[b, video, h] = joined.transpose(0, 1).to(out.dtype)
        return result

    def _alpha(self, heads: Heads) -> torch.Tensor:
        """a of each head and token, [H,S]."""
        count, layout = heads.q.shape[2], heads.layout
        if _number(self.alpha):
            return torch.full((count, layout.tokens), float(self.alpha), device=heads.q.device)  # type: ignore[arg-type]
        logits = heads.weights.get("alpha.logits")
        if logits is None:
            raise ConfigError(
                "linear: alpha is 'trained', but the layer has none; give them as vidaccel.patch(weights=...)"
            )
        if logits.shape[1] not in (1, layout.num_video_blocks):
            raise LayoutError(
                f"linear: alpha was trained for {logits.shape[1]} blocks, and the layout of {layout.grid} in tiles of"
                f" {layout.tile_shape} has {layout.num_video_blocks}; use the resolution and tile it was trained for"
            )
        if logits.shape[0] > 1:
            logits = logits[list(heads.members)]
        found = torch.ones(count, layout.num_blocks, device=heads.q.device)
        found[:, layout.video_blocks] = logits.float().sigmoid()
        return found[:, layout.block_of_token.to(found.device)]

    def _marginal(self, call: Call) -> torch.Tensor:
        """Blocks of the linear branch, bool [1 or B, 1 or H, NB, NB]: not kept, and not among the lowest skipped."""
        marginal = ~call.kept
        video = call.heads.layout.video_blocks
        count = int(self.skipped * call.heads.layout.num_video_blocks)
        if not count:
            return marginal
        probability = call.heads.pooled_logits[:, :, video, video].softmax(-1)
        lowest = probability.argsort(dim=-1, stable=True)[..., :count]
        skipped = torch.zeros_like(probability, dtype=torch.bool).scatter_(-1, lowest, True)
        marginal = marginal.expand(*skipped.shape[:2], -1, -1).clone()
        marginal[:, :, video, video] &= ~skipped
        return marginal


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _chunks(heads: Heads, states: bool) -> Iterator[tuple[int, slice]]:
    """Samples and ranges of heads of which the intermediates fit; with ``states`` each block has one [D, D]."""
    batch, tokens, count, dim = heads.q.shape
    size = tokens * dim + (2 * heads.layout.num_blocks * dim * dim if states else 0)
    step = max(1, min(count, _CHUNK // size))
    for b in range(batch):
        for first in range(0, count, step):
            yield b, slice(first, min(first + step, count))


def _linear(
    heads: Heads, phi: Callable[[torch.Tensor], torch.Tensor], marginal: torch.Tensor | None, b: int, h: slice
) -> torch.Tensor:
    """Linear attention of some heads of a sample, [h,S,D], in float32 at least."""
    kind = torch.promote_types(heads.q.dtype, torch.float32)
    q, k, v = (x[b, :, h].transpose(0, 1).to(kind) for x in (heads.q, heads.k, heads.v))
    q, k = phi(q), phi(k)
    if marginal is None:
        return (q @ (k.mT @ v)) / ((q * k.sum(1, keepdim=True)).sum(-1, keepdim=True) + _EPSILON)
    index, valid, back = _padded(heads.layout, q.device)
    q_blocks, k_blocks, v_blocks = q[:, index], k[:, index] * valid, v[:, index]
    mask = _part(marginal, b, h).to(kind)
    states = k_blocks.mT @ v_blocks
    states = (mask @ states.flatten(2)).unflatten(2, states.shape[2:])
    sums = mask @ k_blocks.sum(2)
    out = (q_blocks @ states) / ((q_blocks * sums[:, :, None]).sum(-1, keepdim=True) + _EPSILON)
    return out.flatten(1, 2)[:, back]


def _projected(heads: Heads, x: torch.Tensor) -> torch.Tensor:
    """x [...,D] by the layer's projection, which all heads share."""
    bias = heads.weights.get("projection.bias")
    return F.linear(x, heads.weights["projection.weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))


def _part(mask: torch.Tensor, b: int, h: slice) -> torch.Tensor:
    """The masks of some heads of a sample, [h or 1, NB, NB], of one that samples or heads may share."""
    sample = mask[b if mask.shape[0] > 1 else 0]
    return sample[h] if sample.shape[0] > 1 else sample


@lru_cache(maxsize=16)
def _padded(layout: TokenLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token of each place of each block, int64 [NB,T]; whether there is one, bool [NB,T,1]; place of each token [S]."""
    longest = int(layout.block_sizes.max())
    place, offsets = torch.arange(longest), layout.block_offsets[:-1]
    index = (offsets[:, None] + place).clamp(max=layout.tokens - 1)
    valid = (place < layout.block_sizes[:, None])[..., None]
    block = layout.block_of_token.cpu()
    back = block * longest + torch.arange(layout.tokens) - offsets[block]
    return index.to(device), valid.to(device), back.to(device)
