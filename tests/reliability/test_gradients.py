"""Sparse attention has no gradient yet: asking for one is an error in words, never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vidaccel
from tests.kernels.helpers import make_layout
from tests.reliability.plans import SPARSE
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, PatternSpec, Plan
from vidaccel.blockmask import BlockMask
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import kernels
from vidaccel.patterns.registry import build_pattern
from vidaccel.types import PRECISIONS

SAYS = r"vidaccel's attention has no gradient yet; run it under torch\.no_grad\(\), and call vidaccel\.unpatch\(pipe\)"
GRID, LAYOUT = (5, 6, 7), make_layout((5, 6, 7), (2, 3, 4))
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])


def inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, LAYOUT.tokens, 2, 16, generator=draw).requires_grad_() for _ in range(3)]


def mask() -> BlockMask:
    return BlockMask.from_dense(build_pattern(WINDOW).blocks(LAYOUT))  # type: ignore[attr-defined]


@pytest.mark.parametrize("lse", [False, True], ids=["output", "with LSE"])
@pytest.mark.parametrize("tail", [False, True], ids=["dropped", "tail"])
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_no_kernel_gives_a_gradient_but_the_oracle(kernel: Any, tail: bool, lse: bool) -> None:
    q, k, v = inputs()
    native = PRECISIONS["int8" if kernel.name == "emulated" else "native"]
    if kernel.why_not(KernelRequest.of(q, native, tail=tail, return_lse=lse)) is not None:
        pytest.skip(f"{kernel.name} does not run here")

    def run() -> tuple[torch.Tensor, ...]:
        found = kernel(q, k, v, LAYOUT, mask(), precision=native, tail=tail, return_lse=lse)
        return found if lse else (found,)

    with torch.no_grad():
        expected = run()
    found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "running it forward is no error"
    for out in found:
        if kernel.name == "reference":
            out.sum().backward(retain_graph=True)
            continue
        with pytest.raises(vidaccel.KernelError, match=SAYS):
            out.sum().backward(retain_graph=True)
    if kernel.name != "reference":
        assert q.grad is None and k.grad is None and v.grad is None


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "Attention": lambda plan, q, k, v: vidaccel.Attention(plan)(q, k, v, grid=GRID, noise_level=0.5),
    "attention": lambda plan, q, k, v: vidaccel.attention(q, k, v, plan=plan, grid=GRID, noise_level=0.5),
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("compensation", ["none", "pooled_tail"])
def test_attention_without_a_model(how: str, compensation: str) -> None:
    plan = Plan.uniform("window", HeadPolicy(WINDOW, compensation=compensation))
    out = CALLS[how](plan, *inputs())
    with pytest.raises(vidaccel.KernelError, match=SAYS):
        out.sum().backward()


@pytest.mark.parametrize("plan", [SPARSE, Plan.dense()], ids=lambda plan: plan.name)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_patched_transformer(plan: Plan, compiled: bool) -> None:
    model = CASES[0].make().transformer.train()
    vidaccel.patch(model, plan)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with pytest.raises(Exception, match=SAYS):
        run(torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32), return_dict=False)[
            0
        ].sum().backward()
    vidaccel.unpatch(model)
    out = model(torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32), return_dict=False)[0]
    out.sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].attn1.parameters())


def test_gradient_checkpointing() -> None:
    """It runs the blocks again in the backward pass, outside of the transformer's forward."""
    model = CASES[0].make().transformer.train()
    model.enable_gradient_checkpointing()
    vidaccel.patch(model, SPARSE)
    out = model(torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32), return_dict=False)[0]
    with pytest.raises(vidaccel.VidaccelError, match=SAYS):
        out.sum().backward()
