"""S2-Attention's shards, by the published condition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vidaccel
from tests.patterns.calls import LAYOUTS, make_call
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Ordered, Shards, choose_blocks


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])
@pytest.mark.parametrize(("stride", "near", "step"), [(5, 1, 1), (4, 0, 2), (1, 0, 1)])
def test_it_is_its_formula(layout: TokenLayout, stride: int, near: int, step: int) -> None:
    call = make_call(layout)
    found = Shards(stride=stride, near=near, step=step).choose(call)
    tiles = layout.block_coords.tolist()
    for head in range(3):
        wanted = [
            [
                (j + head * step + 1) % stride == 0 or max(abs(x - y) for x, y in zip(a, b, strict=True)) <= near
                for j, b in enumerate(tiles)
            ]
            for a in tiles
        ]
        assert found[0, head].tolist() == found[1, head].tolist() == wanted
    blocks = choose_blocks(Shards(stride=stride, near=near, step=step), call)
    assert bool(blocks[:, :, layout.text_blocks].all()) and bool(blocks[..., layout.text_blocks].all())


def test_heads_go_by_their_number_in_the_layer_and_see_everything_together() -> None:
    layout = LAYOUTS[0]
    call = make_call(layout, heads=4)
    pattern = Shards(stride=4, near=0)
    kept = pattern.choose(call)
    assert bool(kept.any(1).all())
    some = pattern.choose(call.only(torch.tensor([3, 1])))
    assert torch.equal(some, kept[:, [3, 1]]) and not torch.equal(some[:, 0], some[:, 1])
    sizes = layout.block_sizes.double()
    share = float((kept[0].double() @ sizes @ sizes).mean()) / layout.tokens**2
    assert pattern.density(layout) == pytest.approx(share)
    wrapped = Ordered(by="hilbert", pattern=Shards(stride=4))
    moved = wrapped.order(call)
    assert bool(wrapped.choose(call.reordered(moved)).any(1).all())


def test_heads_differ_in_a_pipeline() -> None:
    pipe = CASES[0].make()
    dense = CASES[0].run(pipe)
    policy = HeadPolicy(PatternSpec.make("shards", stride=3, near=0), compensation="pooled_tail")
    session = vidaccel.patch(pipe, Plan("test", (Rule(LayerPolicy((policy,))),), tile=TileShape(1, 1, 2)), strict=True)
    found = CASES[0].run(pipe)
    assert session.report().sparse_calls == session.report().calls and not torch.equal(found, dense)


def test_words_and_mistakes() -> None:
    pattern = Shards(stride=6, near=1)
    assert pattern.resolved(LAYOUTS[0]) == "every 6th of 18 blocks + tiles up to 1 apart"
    for change, message in (({"stride": 0}, "stride is 0"), ({"near": -1}, "near is -1"), ({"step": 0}, "step is 0")):
        with pytest.raises(ConfigError, match=message):
            replace(pattern, **change)
