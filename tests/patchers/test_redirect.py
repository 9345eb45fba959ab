"""Redirected processors: the model's own code with another attention call."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.nn import functional as F

from vidaccel.errors import PatchError
from vidaccel.patchers.redirect import redirected


class Plain:
    """Both ways to attend, in one method each."""

    def __init__(self) -> None:
        self.colour = "red"

    def __call__(self, q: torch.Tensor, k: torch.Tensor, mask: Any = None, *, causal: bool = False) -> torch.Tensor:
        return dispatch_attention_fn(q, k, k, attn_mask=mask, is_causal=causal)


class Elsewhere:
    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        return helper(q)


def helper(q: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q, q)


def test_it_stays_a_processor_of_its_class() -> None:
    original = WanAttnProcessor()
    ours = redirected(WanAttnProcessor)(original)
    assert isinstance(ours, WanAttnProcessor) and ours.original is original
    assert inspect.signature(ours.__call__) == inspect.signature(original.__call__)
    code, theirs = type(ours).__call__.__code__, WanAttnProcessor.__call__.__code__
    assert code.co_filename == theirs.co_filename and code.co_firstlineno == theirs.co_firstlineno
    assert redirected(WanAttnProcessor) is type(ours), "one class, whatever the number of layers"


def test_attributes_of_the_original_are_there() -> None:
    ours = redirected(Plain)(Plain())
    assert ours.colour == "red"  # type: ignore[attr-defined]


def test_what_is_not_plain_self_attention_goes_where_it_went() -> None:
    """Without a session behind it our operator cannot read its handle, so only what does not reach it works."""
    ours: Any = redirected(Plain)(Plain())
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 2, 8, generator=generator), torch.randn(1, 6, 2, 8, generator=generator)
    assert torch.equal(ours(q, k), Plain()(q, k))
    ours.handle = torch.tensor([-1])
    assert torch.equal(ours(q, q, causal=True), Plain()(q, q, causal=True))
    ours.handle = torch.empty(0, dtype=torch.int64)
    with pytest.raises(Exception, match="one element tensors"):
        ours(q, q)


def test_a_processor_without_an_attention_call_of_its_own_is_refused() -> None:
    with pytest.raises(PatchError, match="Elsewhere does not call diffusers' or torch's attention function itself"):
        redirected(Elsewhere)


def test_a_processor_without_source_is_refused() -> None:
    made: dict[str, Any] = {}
    exec("class Typed:\n    def __call__(self, q):\n        return q", made)
    with pytest.raises(PatchError, match="source of Typed is not at hand"):
        redirected(made["Typed"])


def test_a_mask_that_is_no_longer_built_as_known_is_refused() -> None:
    known = frozenset({"attention_mask", "self_attn_mask_1", "self_attn_mask_2"})
    source = inspect.getsource(HunyuanVideo15AttnProcessor2_0.__call__)
    assert all(f"{name} = " in source for name in known)
    redirected(HunyuanVideo15AttnProcessor2_0, known)
    with pytest.raises(PatchError, match="does not assign other_mask"):
        redirected(HunyuanVideo15AttnProcessor2_0, known | {"other_mask"})


def closed(scale: float) -> tuple[type, type]:
    class Closure:
        def __call__(self, q: torch.Tensor) -> torch.Tensor:
            return dispatch_attention_fn(q * scale, q, q)

    class Super(Plain):
        def __call__(self, q: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return dispatch_attention_fn(super().__call__(q, q), q, q)

    return Closure, Super


@pytest.mark.parametrize(("which", "name"), [(0, "Closure takes scale from"), (1, "Super takes __class__ from")])
def test_a_processor_that_reaches_outside_its_source_is_refused(which: int, name: str) -> None:
    with pytest.raises(PatchError, match=name):
        redirected(closed(2.0)[which])
