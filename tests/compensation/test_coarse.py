"""VSA's coarse branch against its formula, and its gate at the start of training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.compensation.calls import LAYOUTS, Array, Head, allowed_of, call_of, random_blocks, sparse_row
from tests.patterns.calls import heads_of, make_call, softmax
from tests.rounding import assert_rounded
from vidaccel.compensation import Coarse, build_compensation
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.errors import ConfigError
from vidaccel.kernels import torch_sparse
from vidaccel.layout import TokenLayout
from vidaccel.patterns import HeadOrder, Heads

IDS = ["no text", "text last", "text first"]
CHANNELS = 20


def _oracle(head: Head, kept: Array, gate: Array) -> Array:
    """Token by token; ``gate`` [S,D]."""
    out = np.zeros_like(head.q)
    for i, tokens in enumerate(head.blocks):
        coarse = np.zeros(head.v.shape[1])
        if i in head.video:
            q = head.mean(head.q, i)
            weights = softmax(np.array([head.scale * float(q @ head.k_means[j]) for j in head.video]))
            coarse = sum((w * head.mean(head.v, j) for w, j in zip(weights, head.video, strict=True)), coarse)
        for t in tokens:
            out[t] = sparse_row(head, t, kept[i]) + gate[t] * coarse
    return out


def _given(heads: Heads, *, zero: bool = False, bias: bool = True) -> Heads:
    """The call with hidden states and a gate of all three heads."""
    draw = torch.Generator().manual_seed(3)
    batch, tokens, count, dim = heads.q.shape
    weights = {"gate.weight": torch.randn(count * dim, CHANNELS, generator=draw).double() / 4}
    if bias:
        weights["gate.bias"] = torch.randn(count * dim, generator=draw).double()
    if zero:
        weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    hidden = torch.randn(batch, CHANNELS, tokens, generator=draw).double().transpose(1, 2)
    return replace(heads, weights=weights, hidden=hidden)


@pytest.mark.parametrize(("layout", "bias"), [*zip(LAYOUTS, (True, True, False), strict=True)], ids=IDS)
def test_it_is_its_formula(layout: TokenLayout, bias: bool) -> None:
    heads, blocks = _given(make_call(layout), bias=bias), random_blocks(layout)
    call = call_of(heads, blocks)
    out = Coarse().attend(call)
    assert heads.hidden is not None
    weight, shift = heads.weights["gate.weight"].numpy(), heads.weights.get("gate.bias")
    for b, sample in list(enumerate(heads_of(heads)))[1:]:
        gate = heads.hidden[b].numpy() @ weight.T + (0 if shift is None else shift.numpy())
        for h, head in enumerate(sample):
            expected = _oracle(head, blocks[b, h].numpy(), gate.reshape(len(gate), 3, -1)[:, h])
            assert_rounded(out[b, :, h], torch.from_numpy(expected), allowed_of(heads))
    assert call.density == pytest.approx(call.share + (layout.num_video_blocks / layout.tokens) ** 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_one_number_for_a_gate(layout: TokenLayout) -> None:
    heads, blocks = make_call(layout), random_blocks(layout)
    out = Coarse(gate=0.3).attend(call_of(heads, blocks))
    for b, sample in list(enumerate(heads_of(heads)))[:1]:
        for h, head in enumerate(sample):
            expected = _oracle(head, blocks[b, h].numpy(), np.full_like(head.q, 0.3))
            assert_rounded(out[b, :, h], torch.from_numpy(expected), allowed_of(heads))
    plain = call_of(heads, blocks).sparse()
    text = [i for i in range(layout.tokens) if not 0 <= i - layout.video_start < layout.grid.tokens]
    assert torch.equal(out[:, text], plain[:, text])


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_a_zero_gate_and_none_are_the_plain_sparse_result(layout: TokenLayout) -> None:
    heads, blocks = make_call(layout), random_blocks(layout)
    plain = call_of(heads, blocks).sparse()
    assert torch.equal(Coarse().attend(call_of(_given(heads, zero=True), blocks)), plain)
    call = call_of(heads, blocks)
    assert torch.equal(Coarse().attend(call), plain) and call.density == call.share
    assert torch.equal(Coarse(gate=0.0).attend(call_of(heads, blocks)), plain)
    assert not torch.equal(Coarse().attend(call_of(_given(heads), blocks)), plain)


def test_samples_and_heads_on_their_own() -> None:
    heads, blocks = _given(make_call(LAYOUTS[1])), random_blocks(LAYOUTS[1])
    out = Coarse().attend(call_of(heads, blocks))
    for b in range(2):
        alone = Coarse().attend(call_of(heads.sample(b), blocks[b : b + 1]))
        assert_rounded(alone, out[b : b + 1], allowed_of(heads))
    order = torch.tensor([2, 0])
    found = Coarse().attend(call_of(heads.only(order), blocks[:, order]))
    assert_rounded(found, out[:, :, order], allowed_of(heads))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_low_precision(dtype: torch.dtype, allowed: float) -> None:
    heads, blocks = _given(make_call(LAYOUTS[1])), random_blocks(LAYOUTS[1])
    exact = Coarse().attend(call_of(heads, blocks))
    assert heads.hidden is not None
    low = replace(heads, hidden=heads.hidden.to(dtype), **{x: getattr(heads, x).to(dtype) for x in "qkv"})
    found = Coarse().attend(call_of(low, blocks, torch_sparse.block_sparse_attention))
    assert found.dtype == dtype
    assert float((found.double() - exact).norm() / exact.norm()) < allowed


def test_tokens_in_an_order_of_each_head() -> None:
    """The gate of a token goes where the head's order puts the token."""
    layout = LAYOUTS[2]
    heads, blocks = _given(make_call(layout)), random_blocks(layout)
    # within blocks, so that the blocks hold the same tokens and the output is the same but for its order
    block, noise = layout.block_of_token, torch.rand(2, 3, layout.tokens)
    index = (block + noise).argsort(-1)
    order = HeadOrder(index, index)
    found = Coarse().attend(call_of(heads.reordered(order), blocks))
    expected = Coarse().attend(call_of(heads, blocks))
    assert_rounded(order.restore(found), expected, allowed_of(heads))
    assert not torch.allclose(found, expected)


def test_a_gate_needs_the_layers_input() -> None:
    lacking = replace(_given(make_call(LAYOUTS[0])), hidden=None)
    with pytest.raises(ConfigError, match="nobody gave it what the layer's projections took; call the layer"):
        Coarse().attend(call_of(lacking, random_blocks(LAYOUTS[0])))


def test_by_name() -> None:
    assert build_compensation(CompensationSpec("coarse")) == Coarse()
    fixed = build_compensation(CompensationSpec.make("coarse", gate=0.5))
    assert fixed.always and fixed.trained == () and not fixed.needs_hidden
    assert Coarse().trained == ("gate",) and Coarse().needs_hidden and Coarse().neutral
    for wrong in ("much", True):
        with pytest.raises(
            ConfigError, match="coarse: gate is .*; give a number, or leave it out for the trained gate"
        ):
            build_compensation(CompensationSpec.make("coarse", gate=wrong))
