"""SLA's and SLA2's linear branch against their formulas, and what they are at the start of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import layouts, token_mask
from tests.compensation.calls import LAYOUTS, Array, Head, call_of, random_blocks, sparse_row
from tests.patterns.calls import heads_of, make_call, softmax
from vidaccel.compensation import Linear, build_compensation, linear
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.errors import ConfigError, LayoutError
from vidaccel.kernels import torch_sparse
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Heads

IDS = ["no text", "text last", "text first"]
PHI: dict[str, Callable[[Array], Array]] = {
    "softmax": softmax,
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
}


def _given(heads: Heads, *, zero: bool = False, alpha: int = 0) -> Heads:
    """The call with a projection, or with mixing weights of ``alpha`` blocks."""
    draw = torch.Generator().manual_seed(3)
    dim = heads.q.shape[-1]
    weights = {
        "projection.weight": torch.randn(dim, dim, generator=draw) / 4,
        "projection.bias": torch.randn(dim, generator=draw),
    }
    if zero:
        weights = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    if alpha:
        weights = {"alpha.logits": torch.randn(3, alpha, generator=draw)}
    return replace(heads, weights=weights)


def _oracle(rule: Linear, heads: Heads, head: Head, number: int, kept: Array) -> Array:
    """Token by token, with both sums over keys written out."""
    phi_q, phi_k = PHI[rule.features](head.q), PHI[rule.features](head.k)
    out = np.zeros_like(head.q)
    count = len(head.video)
    for i, tokens in enumerate(head.blocks):
        branch = list(range(len(head.blocks)))
        if rule.form == "complement" and i in head.video:
            p = [head.scale * float(head.mean(head.q, i) @ head.k_means[j]) for j in head.video]
            lowest = [head.video[j] for j in np.argsort(p)[: int(rule.skipped * count)]]
            branch = [j for j in branch if not kept[i, j] and j not in lowest]
        for t in tokens:
            out[t] = sparse_row(head, t, kept[i])
            if i not in head.video:
                continue
            above, below = np.zeros(head.v.shape[1]), 0.0
            for j in branch:
                weights = phi_k[head.blocks[j]] @ phi_q[t]
                above, below = above + weights @ head.v[head.blocks[j]], below + float(weights.sum())
            o_l = above / (below + 1e-5)
            if rule.alpha is None:
                w, b = (heads.weights[f"projection.{x}"].double().numpy() for x in ("weight", "bias"))
                out[t] = out[t] + w @ o_l + b
                continue
            a = 1.0
            if branch and isinstance(rule.alpha, str):
                logits = heads.weights["alpha.logits"][number].double().numpy()
                a = 1 / (1 + np.exp(-logits[head.video.index(i) if len(logits) > 1 else 0]))
            elif branch:
                a = float(rule.alpha)  # type: ignore[arg-type]
            out[t] = a * out[t] + (1 - a) * o_l
    return out


def _compared(rule: Linear, heads: Heads, samples: int = 1) -> None:
    """The rule's output against the oracle's."""
    layout = heads.layout
    blocks = random_blocks(layout)
    call = call_of(heads, blocks)
    out = rule.attend(call)
    assert out.dtype == torch.float64 and out.shape == heads.q.shape and not heads.q.is_contiguous()
    for b, sample in list(enumerate(heads_of(heads)))[-samples:]:
        for h, head in enumerate(sample):
            expected = torch.from_numpy(_oracle(rule, heads, head, h, blocks[b, h].numpy()))
            near = 1e-6 if rule.alpha == "trained" else 1e-9  # float32 weights
            torch.testing.assert_close(out[b, :, h], expected, rtol=near, atol=near)
    plain = call_of(heads, blocks).sparse()
    text = [i for i in range(layout.tokens) if not 0 <= i - layout.video_start < layout.grid.tokens]
    assert torch.equal(out[:, text], plain[:, text])
    assert not torch.allclose(out, plain)
    assert call.density == pytest.approx(call.share + 16 / layout.tokens)


@pytest.mark.parametrize("features", list(PHI))
def test_all_tokens_with_a_projection(features: str) -> None:
    """What SLA's code computes."""
    _compared(Linear(features=features), _given(make_call(LAYOUTS[1])))


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_the_complement_with_a_projection(layout: TokenLayout) -> None:
    """What SLA's paper says: the lowest tenth is left out, what is kept is exact, the rest is linear."""
    _compared(Linear(form="complement", skipped=0.1), _given(make_call(layout)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
@pytest.mark.parametrize("number", [1, None], ids=["one alpha", "one for each block"])
def test_the_complement_mixed(layout: TokenLayout, number: int | None) -> None:
    """What SLA2 says."""
    heads = _given(make_call(layout), alpha=number or layout.num_video_blocks)
    _compared(Linear(form="complement", alpha="trained"), heads, samples=2 if number is None else 1)


def test_a_number_for_alpha() -> None:
    _compared(Linear(features="elu", alpha=0.75), make_call(LAYOUTS[2]))
    _compared(Linear(features="relu", form="complement", skipped=0.3, alpha=0.75), make_call(LAYOUTS[2]))


@pytest.mark.parametrize("form", ["all", "complement"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_a_zero_projection_and_none_are_the_plain_sparse_result(layout: TokenLayout, form: str) -> None:
    heads, blocks = make_call(layout), random_blocks(layout)
    for dtype in (torch.float64, torch.bfloat16):
        low = replace(heads, **{x: getattr(heads, x).to(dtype) for x in "qkv"})
        plain = call_of(low, blocks).sparse()
        assert torch.equal(Linear(form=form).attend(call_of(_given(low, zero=True), blocks)), plain)
        call = call_of(low, blocks)
        assert torch.equal(Linear(form=form).attend(call), plain) and call.density == call.share
        assert not torch.equal(Linear(form=form).attend(call_of(_given(low), blocks)), plain)


def test_alpha_of_one_is_the_plain_sparse_result() -> None:
    heads, blocks = make_call(LAYOUTS[1]), random_blocks(LAYOUTS[1])
    plain = call_of(heads, blocks).sparse()
    torch.testing.assert_close(Linear(alpha=1.0).attend(call_of(heads, blocks)), plain)


@pytest.mark.parametrize(
    "rule", [Linear(), Linear(form="complement", skipped=0.2), Linear(form="complement", alpha=0.4)]
)
def test_samples_heads_and_shared_masks(rule: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, blocks = _given(make_call(LAYOUTS[1])), random_blocks(LAYOUTS[1])
    out = rule.attend(call_of(heads, blocks))
    for b in range(2):
        torch.testing.assert_close(rule.attend(call_of(heads.sample(b), blocks[b : b + 1])), out[b : b + 1])
    order = torch.tensor([2, 0])
    torch.testing.assert_close(rule.attend(call_of(heads.only(order), blocks[:, order])), out[:, :, order])
    shared = blocks[:1, :1]
    expected = rule.attend(call_of(heads, shared.expand_as(blocks)))
    torch.testing.assert_close(rule.attend(call_of(heads, shared)), expected)
    monkeypatch.setattr(linear, "_CHUNK", 1)  # every head in a round of its own
    torch.testing.assert_close(rule.attend(call_of(heads, blocks)), out)


@settings(max_examples=40)
@given(
    layout=layouts(most=120), density=st.sampled_from([0.0, 0.3, 0.8, 1.0]), form=st.sampled_from(["all", "complement"])
)
def test_any_layout_and_mask(layout: TokenLayout, density: float, form: str) -> None:
    """The formula over all pairs of tokens at once, on grids of any shape."""
    n = layout.num_blocks
    kept = (torch.rand(1, 2, n, n) < density) | torch.eye(n, dtype=torch.bool)
    kept[:, :, layout.text_blocks] = True
    kept[..., layout.text_blocks] = True
    heads = make_call(layout, batch=1, heads=2, dim=4)
    call = call_of(heads, kept)
    found = Linear(form=form, alpha=0.25).attend(call)
    q, k, v = (x.transpose(1, 2) for x in (heads.q, heads.k, heads.v))
    pairs = token_mask(layout, ~kept if form == "complement" else torch.ones_like(kept))
    weights = (q.softmax(-1) @ k.softmax(-1).mT) * pairs
    branch = weights @ v / (weights.sum(-1, keepdim=True) + 1e-5)
    share = torch.where(pairs.any(-1), 0.25, 1.0)
    place = torch.arange(layout.tokens) - layout.video_start
    share[..., (place < 0) | (place >= layout.grid.tokens)] = 1.0
    share = share[..., None]
    plain = call_of(heads, kept).sparse().transpose(1, 2)
    torch.testing.assert_close(found.transpose(1, 2), share * plain + (1 - share) * branch, rtol=1e-9, atol=1e-9)


def test_trained_alpha_goes_by_the_heads_number() -> None:
    layout = LAYOUTS[0]
    heads, blocks = _given(make_call(layout), alpha=layout.num_video_blocks), random_blocks(layout)
    rule = Linear(form="complement", alpha="trained")
    out = rule.attend(call_of(heads, blocks))
    order = torch.tensor([2, 0])
    torch.testing.assert_close(rule.attend(call_of(heads.only(order), blocks[:, order])), out[:, :, order])


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("form", ["all", "complement"])
def test_low_precision(dtype: torch.dtype, allowed: float, form: str) -> None:
    heads, blocks = _given(make_call(LAYOUTS[1])), random_blocks(LAYOUTS[1])
    exact = Linear(form=form).attend(call_of(heads, blocks))
    low = replace(heads, **{x: getattr(heads, x).to(dtype) for x in "qkv"})
    found = Linear(form=form).attend(call_of(low, blocks, torch_sparse.block_sparse_attention))
    assert found.dtype == dtype
    assert float((found.double() - exact).norm() / exact.norm()) < allowed


def test_alpha_that_is_missing_or_for_another_video() -> None:
    rule = Linear(form="complement", alpha="trained")
    with pytest.raises(ConfigError, match=r"alpha is 'trained', .* give .* vidaccel\.patch\(weights=\.\.\.\)"):
        rule.attend(call_of(make_call(LAYOUTS[0]), random_blocks(LAYOUTS[0])))
    with pytest.raises(LayoutError, match=r"trained for 7 blocks, and the layout of 5x7x9 in tiles .* has 18; use the"):
        rule.attend(call_of(_given(make_call(LAYOUTS[0]), alpha=7), random_blocks(LAYOUTS[0])))


def test_by_name() -> None:
    assert build_compensation(CompensationSpec("linear")) == Linear()
    assert Linear().trained == ("projection",) and Linear().neutral and Linear().always
    assert Linear(alpha="trained").trained == ("alpha",) and not Linear(alpha="trained").neutral
    assert Linear(alpha=0.5).trained == () and not Linear().needs_hidden


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"features": "tanh"}, "features is 'tanh'; valid are softmax, elu, relu"),
        ({"form": "some"}, "form is 'some'; valid are all, complement"),
        ({"skipped": 0.1}, "skipped is 0.1; give a share from 0 .* only with form complement"),
        ({"form": "complement", "skipped": 1.0}, "skipped is 1.0"),
        ({"form": "complement", "skipped": "a"}, "skipped is 'a'"),
        ({"alpha": 1.5}, r"alpha is 1.5; give a number in \[0, 1\], 'trained' or nothing"),
        ({"alpha": "learned"}, "alpha is 'learned'"),
        ({"alpha": True}, "alpha is True"),
    ],
)
def test_parameters_out_of_range(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=f"linear: {says}"):
        build_compensation(CompensationSpec.make("linear", **wrong))
