"""Two ways to make a training step cheaper without changing what is learned.

- :class:`CollapsedPadding`: a caption has about ten tokens, but ``WanPipeline`` pads it with zeros to
  ``max_sequence_length``, and the transformer attends to the zeros. All padding tokens are equal, so n of them weigh
  as much in a softmax as one whose logit is raised by log n. That one token replaces them, exactly.
- :class:`FrameSubset`: a few frames of a clip, each at its true position in time, are a valid clip with fewer
  tokens. Attention costs the square of the number of tokens, so a quarter of the frames costs about an eighth.
"""

import math
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class CollapsedPadding:
    """Cross-attention processor for captions of ``length`` tokens followed by one token that stands for the padding.

    Give the transformer text embeddings of ``length + 1`` tokens, the last one zero, and call :meth:`pad_to` with the
    sequence length that is to be imitated.
    """

    def __init__(self, length: int, device: torch.device | str = "cpu") -> None:
        self.length = length
        self.bias = torch.zeros(length + 1, device=device)

    def pad_to(self, total: int) -> None:
        """Imitate captions padded to ``total`` tokens."""
        if total <= self.length:
            raise ValueError(f"cannot imitate {total} tokens: captions alone take {self.length}")
        self.bias[-1] = math.log(total - self.length)

    def install(self, transformer: WanTransformer3DModel) -> None:
        """Use this processor in all cross-attention layers of ``transformer``."""
        for block in transformer.blocks:
            block.attn2.set_processor(self)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Attend from the video (batch, tokens, width) to the collapsed text (batch, length + 1, width)."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + self.bias.to(query.dtype)
        mixed = logits.softmax(-1).to(value.dtype) @ value
        output: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return output


class FrameSubset:
    """Makes the rotary embedding of a transformer place frames at chosen positions of a longer clip.

    ``total`` is the number of frames of the whole clip; :attr:`frames` the sorted positions of those in use.
    """

    def __init__(self, transformer: WanTransformer3DModel, total: int) -> None:
        self.total = total
        self.frames = torch.arange(total)
        self._handle: RemovableHandle = transformer.rope.register_forward_hook(self._select)
        self._whole: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def remove(self) -> None:
        """Give the transformer its own rotary embedding back."""
        self._handle.remove()

    def choose(self, count: int, generator: torch.Generator) -> None:
        """Use ``count`` frames, one drawn from each of ``count`` equal spans, the first and the last always.

        The ends stay because relative positions are all that the transformer sees: where a clip begins and ends is
        how it knows where in the clip a frame is.
        """
        if self.total % count:
            raise ValueError(f"{count} frames do not divide a clip of {self.total}")
        span = self.total // count
        frames = torch.arange(0, self.total, span) + torch.randint(span, (count,), generator=generator)
        frames[0], frames[-1] = 0, self.total - 1
        self.frames = frames

    def _select(self, module: Any, args: tuple[Tensor, ...], output: Any) -> tuple[Tensor, Tensor]:
        _, channels, _, height, width = args[0].shape
        key = (height, width)
        if key not in self._whole:
            blank = args[0].new_empty(1, channels, self.total, height, width)
            cos, sin = module.forward(blank)  # not module(blank): that would run this hook again
            self._whole[key] = (cos.float(), sin.float())
        cos, sin = (table.unflatten(1, (self.total, -1))[:, self.frames].flatten(1, 2) for table in self._whole[key])
        return cos, sin
