"""The Linears of a transformer's blocks: which may be quantised, and what each is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["LinearPlace", "linear_places", "stacks_of"]

# parts of names, as diffusers' models have them
_NEVER = {
    "norm": "norms and their modulation stay as they are",
    "modulation": "norms and their modulation stay as they are",
    "embed": "embeddings stay as they are",
    "time_": "embeddings stay as they are",
    "to_gate": "gates stay as they are",
    "lora_": "LoRA's own layers stay as they are",
    "audio": "the audio stream stays as it is",
    "av_cross": "the audio stream stays as it is",
    "va_cross": "the audio stream stays as it is",
}
_FEED_FORWARD = ("ff", "ffn", "mlp", "feed_forward", "ff_context", "txt_ff", "proj_mlp")
_OTHER = "it belongs neither to attention nor to a feed-forward"
_WRAPPERS = ("base_layer", "_orig_mod")  # of PEFT and torch.compile


@dataclass(frozen=True, eq=False)
class LinearPlace:
    """One Linear inside a block.

    Args:
        module: its path in the transformer with a star for the layer, without what PEFT or torch.compile wrap it in.
        layer: number of its block in the stack.
        linear: the layer.
        kind: the part of the block it belongs to, ``attn1`` or ``ffn``.
        kept: why it is never quantised, or ``None``.
    """

    module: str
    layer: int
    linear: nn.Linear
    kind: str
    kept: str | None = None


def stacks_of(layers: Sequence[str]) -> tuple[str, ...]:
    """The stacks of blocks in a family's paths: ``blocks`` of ``blocks.*.attn1``."""
    return tuple(dict.fromkeys(path.split(".*")[0] for path in layers))


def linear_places(model: nn.Module, stacks: Sequence[str]) -> list[LinearPlace]:
    """Every Linear of the blocks, in order; what lies outside the stacks (embeddings, output head) is not looked at.

    Args:
        stacks: paths of the lists of blocks; those that the model lacks are passed over, as families list them all.
    """
    found = []
    for stack in stacks:
        try:
            blocks = model.get_submodule(stack)
        except AttributeError:
            continue
        for layer, block in enumerate(blocks.children()):
            for path, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    parts = [part for part in path.split(".") if part not in _WRAPPERS]
                    name = ".".join([stack, "*", *parts])
                    found.append(LinearPlace(name, layer, module, _kind(parts), _kept(parts, block)))
    return found


def _is_part(name: str) -> bool:
    return "attn" in name or "attention" in name or name in _FEED_FORWARD


def _kind(parts: Sequence[str]) -> str:
    last = next((number for number, part in enumerate(parts) if _is_part(part)), len(parts) - 1)
    return ".".join(parts[: last + 1])


def _kept(parts: Sequence[str], block: nn.Module) -> str | None:
    for word, reason in _NEVER.items():
        if any(word in part for part in parts):
            return reason
    if any(_is_part(part) for part in parts):
        return None
    # the second half of HunyuanVideo's single-stream feed-forward; VACE's projections of that name are no such thing
    return None if parts[-1] == "proj_out" and hasattr(block, "proj_mlp") else _OTHER
