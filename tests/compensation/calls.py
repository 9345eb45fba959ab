"""Calls for the compensations' tests, and the promises that every one of them keeps.

An oracle gets one head of one sample as plain float64 arrays, and which blocks are kept; it says by the published
formula, token by token, what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.patterns.calls import LAYOUTS, Array, Head, heads_of, make_call, softmax
from tests.rounding import assert_rounded, rounding
from vidaccel.blockmask import BlockMask
from vidaccel.compensation import Call, Compensation
from vidaccel.kernels import reference, torch_sparse
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Heads

__all__ = [
    "LAYOUTS",
    "Array",
    "Head",
    "Oracle",
    "allowed_of",
    "call_of",
    "keeps_its_promises",
    "random_blocks",
    "sparse_row",
]

#: The output [S,D] of a head, from kept block pairs [NB,NB].
Oracle = Callable[[Head, Array], Array]


def random_blocks(layout: TokenLayout, batch: int = 2, heads: int = 3, seed: int = 0) -> torch.Tensor:
    """About a third of the video's block pairs, the own block and everything of text, bool [B,H,NB,NB]."""
    generator = torch.Generator().manual_seed(seed)
    n = layout.num_blocks
    keep = (torch.rand(batch, heads, n, n, generator=generator) < 0.3) | torch.eye(n, dtype=torch.bool)
    keep[:, :, layout.text_blocks] = True
    keep[..., layout.text_blocks] = True
    keep[:, :, layout.video_blocks.start + 1] = True  # a row of the video that skips nothing
    return keep


def call_of(heads: Heads, blocks: torch.Tensor, kernel: Callable[..., Any] = reference.block_sparse_attention) -> Call:
    """A call as the engine makes it."""
    mask = BlockMask.from_dense(blocks)

    def run(mask: BlockMask, *, tail: bool = False, return_lse: bool = False) -> Any:
        return kernel(
            heads.q, heads.k, heads.v, heads.layout, mask, scale=heads.scale, tail=tail and not mask.is_full(),
            return_lse=return_lse,
        )  # fmt: skip

    return Call(heads, mask, mask.density(heads.layout), run, {})


def allowed_of(heads: Heads) -> float:
    """What rounding explains in the output of a float64 call: means of blocks and trained weights are float32."""
    return rounding(heads.q.float(), heads.k.float(), heads.v.float(), heads.scale).out


def sparse_row(head: Head, token: int, kept: Array, extra: list[tuple[float, Array]] | None = None) -> Array:
    """Attention of one query over the tokens of the blocks ``kept`` [NB] and extra (logit, value) pairs, [D]."""
    tokens = [t for j, block in enumerate(head.blocks) if kept[j] for t in block]
    logits, values = head.scale * head.k[tokens] @ head.q[token], head.v[tokens]
    if extra:
        logits = np.append(logits, [logit for logit, _ in extra])
        values = np.concatenate([values, [value for _, value in extra]])
    return np.asarray(softmax(logits) @ values)


def keeps_its_promises(rule: Compensation, oracle: Oracle) -> None:
    """The oracle's output on every layout, and what compensations have in common."""
    for layout in LAYOUTS:
        heads, blocks = make_call(layout), random_blocks(layout)
        assert not heads.q.is_contiguous()
        call = call_of(heads, blocks)
        out = rule.attend(call)
        assert out.dtype == heads.q.dtype and out.shape == heads.q.shape
        samples = heads_of(heads)
        for b, h in ((0, 0), (0, 2), (1, 1)):
            expected = torch.from_numpy(oracle(samples[b][h], blocks[b, h].numpy()))
            assert_rounded(out[b, :, h], expected, allowed_of(heads))
        assert call.density >= call.share
        _rows_that_skip_nothing_are_the_kernels(call, out)
        _alone_as_together(rule, heads, blocks, out)
        _nothing_skipped_is_the_kernel(rule, heads)
        _other_kernels_agree(rule, heads, blocks)


def _rows_that_skip_nothing_are_the_kernels(call: Call, out: torch.Tensor) -> None:
    heads = call.heads
    plain = call_of(heads, call.mask.dense).sparse()
    whole = call.mask.dense.all(-1)[..., heads.layout.block_of_token].transpose(1, 2)
    assert bool(whole.any())
    assert torch.equal(out[whole], plain[whole])
    assert not torch.allclose(out[~whole], plain[~whole], rtol=1e-3, atol=1e-3), "it changes something"


def _alone_as_together(rule: Compensation, heads: Heads, blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Each sample alone, heads in another order, contiguous tensors, and one mask for all heads."""
    allowed = allowed_of(heads)
    for b in range(2):
        alone = replace(heads, **{x: getattr(heads, x)[b : b + 1] for x in "qkv"}, memory={})
        assert_rounded(rule.attend(call_of(alone, blocks[b : b + 1])), out[b : b + 1], allowed)
    order = torch.tensor([2, 0, 1])
    assert_rounded(rule.attend(call_of(heads.only(order), blocks[:, order])), out[:, :, order], allowed)
    near = replace(heads, **{x: getattr(heads, x).contiguous() for x in "qkv"}, memory={})
    assert_rounded(rule.attend(call_of(near, blocks)), out, allowed)
    shared = blocks[:1, :1]
    expected = rule.attend(call_of(heads, shared.expand_as(blocks)))
    assert_rounded(rule.attend(call_of(heads, shared)), expected, allowed)


def _nothing_skipped_is_the_kernel(rule: Compensation, heads: Heads) -> None:
    n = heads.layout.num_blocks
    everything = torch.ones(1, 1, n, n, dtype=torch.bool)
    call = call_of(heads, everything)
    torch.testing.assert_close(rule.attend(call), call.sparse(), rtol=1e-12, atol=1e-12)


def _other_kernels_agree(rule: Compensation, heads: Heads, blocks: torch.Tensor) -> None:
    """torch-sparse in the inputs' own dtype, against the oracle kernel on the same rounded inputs."""
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.01)):
        low = replace(heads, **{x: getattr(heads, x).to(dtype) for x in "qkv"}, memory={})
        exact = replace(heads, **{x: getattr(low, x).double() for x in "qkv"}, memory={})
        found = rule.attend(call_of(low, blocks, torch_sparse.block_sparse_attention))
        out = rule.attend(call_of(exact, blocks))
        assert found.dtype == dtype
        assert float((found.double() - out).norm() / out.norm()) < allowed
