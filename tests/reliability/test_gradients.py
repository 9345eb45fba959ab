"""A gradient of sparse attention is right, or asking for it is an error in words; it is never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vidaccel
from tests.kernels.helpers import assert_as_good_as_eager, make_layout
from tests.reliability.plans import SPARSE
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, PatternSpec, Plan
from vidaccel.blockmask import BlockMask
from vidaccel.kernels import reference
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import kernels
from vidaccel.patterns.registry import build_pattern
from vidaccel.types import PRECISIONS

pytestmark = pytest.mark.full

SAYS = r"vidaccel's attention has no gradient yet; run it under torch\.no_grad\(\), and call vidaccel\.unpatch\(pipe\)"
GRID, LAYOUT = (5, 6, 7), make_layout((5, 6, 7), (2, 3, 4))
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])


def inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, LAYOUT.tokens, 2, 16, generator=draw).requires_grad_() for _ in range(3)]


def mask() -> BlockMask:
    return BlockMask.from_dense(build_pattern(WINDOW).blocks(LAYOUT))  # type: ignore[attr-defined]


def gradients(out: torch.Tensor, of: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return list(torch.autograd.grad((out * weights).sum(), of, retain_graph=True))


@pytest.mark.parametrize("lse", [False, True], ids=["output", "with LSE"])
@pytest.mark.parametrize("tail", [False, True], ids=["dropped", "tail"])
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_kernels(kernel: Any, tail: bool, lse: bool) -> None:
    """Against the oracle in float64, of which every step has a gradient."""
    qkv = inputs()
    precision = PRECISIONS["int8" if kernel.name == "emulated" else "native"]
    if kernel.why_not(KernelRequest.of(qkv[0], precision, tail=tail, return_lse=lse)) is not None:
        pytest.skip(f"{kernel.name} does not run here")

    def run() -> tuple[torch.Tensor, ...]:
        found = kernel(*qkv, LAYOUT, mask(), precision=precision, tail=tail, return_lse=lse)
        return found if lse else (found,)

    with torch.no_grad():
        expected = run()
    found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "running it forward is no error"
    for number, out in enumerate(found):
        exact = kernel.name == "reference" or (kernel.name == "torch-sparse" and number == 0 and not tail)
        if not exact:
            with pytest.raises(vidaccel.KernelError, match=SAYS):
                gradients(out, qkv)
            continue
        wide = [x.detach().double().requires_grad_() for x in qkv]
        oracle = reference.block_sparse_attention(*wide, LAYOUT, mask(), tail=tail, return_lse=lse)
        wanted = gradients(oracle[number] if isinstance(oracle, tuple) else oracle, wide[: 3 if number == 0 else 2])
        narrow = reference.block_sparse_attention(
            *qkv, LAYOUT, mask(), tail=tail, return_lse=lse, compute_dtype=torch.float32
        )
        lows = gradients(narrow[number] if isinstance(narrow, tuple) else narrow, qkv[: len(wanted)])
        for got, low, right in zip(gradients(out, qkv[: len(wanted)]), lows, wanted, strict=True):
            assert_as_good_as_eager(got, low, right)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "Attention": lambda plan, q, k, v: vidaccel.Attention(plan)(q, k, v, grid=GRID, noise_level=0.5),
    "attention": lambda plan, q, k, v: vidaccel.attention(q, k, v, plan=plan, grid=GRID, noise_level=0.5),
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("compensation", ["none", "pooled_tail"])
def test_attention_without_a_model(how: str, compensation: str) -> None:
    rules = Plan.uniform("window", HeadPolicy(WINDOW, compensation=compensation)).rules
    plan = Plan("window", rules, tile=LAYOUT.tile_shape)
    qkv = inputs()
    out = CALLS[how](plan, *qkv)
    if compensation == "none":
        wide = [x.detach().double().requires_grad_() for x in qkv]
        order = [LAYOUT.tile(x) for x in wide]
        exact = LAYOUT.untile(reference.block_sparse_attention(*order, LAYOUT, mask()))  # type: ignore[arg-type]
        narrow = reference.block_sparse_attention(
            *(LAYOUT.tile(x) for x in qkv), LAYOUT, mask(), compute_dtype=torch.float32
        )
        lows = gradients(LAYOUT.untile(narrow), qkv)  # type: ignore[arg-type]
        for got, low, right in zip(gradients(out, qkv), lows, gradients(exact, wide), strict=True):
            assert_as_good_as_eager(got, low, right)
        return
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
