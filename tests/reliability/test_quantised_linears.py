"""Linears that a library has quantised: the processors around them are patched as any others.

bitsandbytes computes on the CPU here; GGUF's layers are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vidaccel
from tests.tiny_wan import tiny_wan
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape

WIDTH, CALLS = 32, 8
TOP_K = PatternSpec.make("pooled_top_k", density=0.3)
SPARSE = Plan("sparse", (Rule(LayerPolicy((HeadPolicy(TOP_K, compensation="coarse"),))),), tile=TileShape(2, 2, 2))
GATES = {
    f"blocks.{i}.to_gate_compress.{name}": torch.full(shape, 0.1)
    for i in range(2)
    for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
}


def generate(pipe: Any) -> torch.Tensor:
    """Latents of two steps on a 3x4x6 grid, with guidance."""
    draw = torch.Generator().manual_seed(3)
    embeds = {name: torch.randn(1, 8, 32, generator=draw) for name in ("prompt_embeds", "negative_prompt_embeds")}
    out = pipe(
        **embeds, height=64, width=96, num_frames=9, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1), output_type="latent",
    )  # fmt: skip
    found: torch.Tensor = out.frames
    return found


def _linears(pipe: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every Linear of the blocks."""
    for parent in pipe.transformer.blocks.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child


def torchao_int8(pipe: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer.blocks, quantization.Int8WeightOnlyConfig())


def _bitsandbytes(pipe: Any, make: Callable[[Any, nn.Linear], nn.Module]) -> None:
    library = pytest.importorskip("bitsandbytes")
    for parent, name, layer in list(_linears(pipe)):
        replaced = make(library.nn, layer)
        replaced.load_state_dict(layer.state_dict())
        setattr(parent, name, replaced.to("cpu").requires_grad_(False))  # quantises


def bitsandbytes_8bit(pipe: Any) -> None:
    _bitsandbytes(pipe, lambda bnb, x: bnb.Linear8bitLt(x.in_features, x.out_features, has_fp16_weights=False))


def bitsandbytes_nf4(pipe: Any) -> None:
    _bitsandbytes(
        pipe,
        lambda bnb, x: bnb.Linear4bit(x.in_features, x.out_features, compute_dtype=torch.float32, quant_type="nf4"),
    )


def gguf_q8(pipe: Any) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for parent, name, layer in list(_linears(pipe)):
        replaced = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.float32)
        packed = torch.from_numpy(np.array(gguf.quants.quantize(layer.weight.detach().numpy(), kind)))
        replaced.weight = GGUFParameter(packed, quant_type=kind)
        replaced.bias = layer.bias
        setattr(parent, name, replaced)


@pytest.mark.parametrize("quantise", [torchao_int8, bitsandbytes_8bit, bitsandbytes_nf4, gguf_q8])
def test_quantised_linears(quantise: Callable[[Any], None]) -> None:
    """Quantised before or after patching alike; a dense plan changes no bit, and trained gates find the size."""
    pipe = tiny_wan(text=False)
    exact = generate(pipe)
    quantise(pipe)
    unpatched = generate(pipe)
    assert 0 < float((unpatched - exact).norm() / exact.norm()) < 0.2, "nothing was quantised, or not rightly"
    vidaccel.patch(pipe, "dense", strict=True)
    assert torch.equal(generate(pipe), unpatched)
    vidaccel.unpatch(pipe)
    session = vidaccel.patch(pipe, SPARSE, strict=True, weights=GATES)
    after = generate(pipe)
    report = session.report()
    assert report.sparse_calls == report.calls == CALLS and not torch.equal(after, unpatched)
    vidaccel.unpatch(pipe)
    assert torch.equal(generate(pipe), unpatched)

    pipe = tiny_wan(text=False)
    vidaccel.patch(pipe, SPARSE, strict=True, weights=GATES)
    quantise(pipe)
    assert torch.equal(generate(pipe), after)
