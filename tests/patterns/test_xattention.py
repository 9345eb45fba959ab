"""XAttention: antidiagonals of groups of tokens, with blocks that are no multiple of the stride."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.patterns.calls import LAYOUTS, Array, Head, keeps_its_promises, make_call, softmax
from tests.rounding import assert_rounded, rounding
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import XAttention, xattention
from vidaccel.types import TileShape, VideoGrid


def _estimate(head: Head, stride: int) -> Array:
    """Rows of video blocks, columns of all blocks."""
    groups = []  # (block, its tokens filled up, how many are its own)
    for number, tokens in enumerate(head.blocks):
        for start in range(0, len(tokens), stride):
            filled = [tokens[(start + r) % len(tokens)] for r in range(stride)]
            groups.append((number, filled, min(stride, len(tokens) - start)))
    found = np.zeros((len(head.blocks), len(head.blocks)))
    for i, rows, own in groups:
        if i not in head.video:
            continue
        logits = []
        for _, columns, weight in groups:
            diagonal = [float(head.q[rows[stride - 1 - r]] @ head.k[columns[r]]) for r in range(stride)]
            logits.append(head.scale * sum(diagonal) / stride + math.log(weight))
        for (j, _, _), p in zip(groups, softmax(np.array(logits)), strict=True):
            found[i, j] += own * p / len(head.blocks[i])
    return found[head.video]


def _oracle(head: Head, mass: float, stride: int) -> list[list[bool]]:
    rows = []
    for p in _estimate(head, stride):
        held, best = sum(p[j] for j in head.text), []
        for j in sorted(head.video, key=lambda j: -p[j]):
            if held >= mass and best:
                break
            best.append(j)
            held += p[j]
        rows.append([j in best or j == head.video[0] for j in head.video])
    return rows


@pytest.mark.parametrize(("mass", "stride"), [(0.9, 8), (0.5, 16), (0.8, 4)])
def test_it_is_its_formula(mass: float, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xattention, "_AT_A_TIME", 1 << 12)  # several pieces
    keeps_its_promises(XAttention(mass=mass, stride=stride), lambda head: _oracle(head, mass, stride))


def test_the_estimate_is_exact_where_a_group_is_all_alike() -> None:
    """With the tokens of each group equal, every antidiagonal is the whole square, and its mean any of its logits."""
    layout = TokenLayout.of(VideoGrid(4, 4, 8), TileShape(2, 4, 4))
    call = make_call(layout)
    for x in (call.q, call.k):
        x[:] = x[:, ::8].repeat_interleave(8, 1)
    p = (call.q.transpose(1, 2) @ call.k.permute(0, 2, 3, 1) * call.scale).softmax(-1)
    exact = p.unflatten(-1, (4, 32)).sum(-1).unflatten(2, (4, 32)).mean(3)
    allowed = rounding(call.q.float(), call.k.float(), torch.ones_like(call.v).float(), call.scale).out
    assert_rounded(XAttention(stride=8).estimate(call), exact, allowed)
    assert call.layout.num_blocks == 4


def test_words_and_mistakes() -> None:
    assert (
        XAttention().resolved(LAYOUTS[0])
        == "0.9 of the attention estimated from antidiagonals of stride 8 + first block"
    )
    with pytest.raises(ConfigError, match="stride is 5; valid are 4, 8 and 16"):
        XAttention(stride=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mass is 0"):
        XAttention(mass=0)
