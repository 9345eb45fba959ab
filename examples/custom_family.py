"""A family for your own video transformer: say where its attention is and how its tokens lie, and it can be patched.

python examples/custom_family.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

import vidaccel
from vidaccel.patchers.base import Family
from vidaccel.patchers.registry import register_family

# -- a transformer as you may have it: six layers of attention over a flattened video --------------------------------


class MyProcessor:
    def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out(dispatch_attention_fn(q, k, v).flatten(2))  # type: ignore[no-any-return]


class MyAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.processor = heads, MyProcessor()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


class MyVideoTransformer(nn.Module):
    def __init__(self, dim: int = 48, heads: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": MyAttention(dim, heads)}) for _ in range(6)])

    def forward(self, video: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:  # [B, C, T, H, W]
        x = video.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block.get_submodule("attn")(x)
        return x.transpose(1, 2).unflatten(2, video.shape[2:])


# -- the family ------------------------------------------------------------------------------------------------------


class MyFamily(Family):
    """Where the attention is, what it is called, and how large the video is."""

    name = "mine"
    transformers = ("MyVideoTransformer",)
    pipelines = ()
    layers = ("blocks.*.attn",)
    processors = ("MyProcessor",)
    separate_guidance = False

    def grid(self, model: Any, call: Mapping[str, Any]) -> vidaccel.VideoGrid | str:
        return vidaccel.VideoGrid(*call["video"].shape[2:])


def main() -> None:
    register_family(MyFamily())
    torch.manual_seed(0)
    model = MyVideoTransformer().eval()
    video, timestep = torch.randn(1, 48, 8, 12, 16), torch.tensor([500.0])
    with torch.no_grad():
        dense = model(video, timestep)
        session = vidaccel.patch(model, "sta")
        sparse = model(video, timestep)
        print(session.report())
        vidaccel.unpatch(model)
        again = model(video, timestep)
    error = float((sparse - dense).norm() / dense.norm())
    print(f"relative difference to dense {error:.3f}; after unpatch the same bit for bit: {torch.equal(again, dense)}")


if __name__ == "__main__":
    main()
