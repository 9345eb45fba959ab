"""AnchorAttention on blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.patterns.calls import LAYOUTS, Head, keeps_its_promises, make_call
from vidaccel.errors import ConfigError
from vidaccel.patterns import Anchor, rectangles


def _oracle(head: Head, margin: float) -> list[list[bool]]:
    rows = []
    for i in head.video:
        scores = head.k @ head.mean(head.q, i) * head.scale
        part = [*head.text, head.video[0], i]
        anchor = max(float(scores[t]) for j in part for t in head.blocks[j])
        rows.append([j in part or any(scores[t] >= anchor - margin for t in head.blocks[j]) for j in head.video])
    return rows


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.5])
def test_it_is_its_formula(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rectangles, "_AT_A_TIME", 1 << 12)  # several pieces
    keeps_its_promises(Anchor(margin=margin), lambda head: _oracle(head, margin))


def test_more_margin_keeps_more() -> None:
    call = make_call(LAYOUTS[1])
    kept = [Anchor(margin=m).choose(call) for m in (0.0, 0.7, 2.0, 100.0)]
    assert all(bool((a <= b).all()) and int(a.sum()) < int(b.sum()) for a, b in pairwise(kept))
    assert bool(kept[-1].all()) and bool(kept[0].diagonal(dim1=-2, dim2=-1).all())


def test_rectangles_list_every_token_or_evenly_spaced_ones() -> None:
    layout = LAYOUTS[1]
    everything = rectangles.block_rows(layout, None, torch.device("cpu"))
    some = rectangles.block_rows(layout, 4, torch.device("cpu"))
    for block, (size, first) in enumerate(
        zip(layout.block_sizes.tolist(), layout.block_offsets.tolist(), strict=False)
    ):
        assert set(everything[block].tolist()) == set(range(first, first + size))
        assert len(set(some[block].tolist())) == min(4, size)
        assert set(some[block].tolist()) <= set(range(first, first + size))


def test_words_and_mistakes() -> None:
    assert Anchor(margin=2).resolved(LAYOUTS[0]).startswith("keys within 2 of the largest logit")
    for wrong in (-1, True, "2"):
        with pytest.raises(ConfigError, match="margin is .*; give a number of at least 0"):
            Anchor(margin=wrong)  # type: ignore[arg-type]
