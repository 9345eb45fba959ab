"""Attention by a plan without a diffusers pipeline."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import vidaccel
from examples import own_loop
from tests.rounding import assert_rounded, rounding
from vidaccel import HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape, VideoGrid
from vidaccel.errors import ConfigError, KernelError, LayoutError, StrictError
from vidaccel.kernels import reference
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_static

GRID, TILE = VideoGrid(3, 5, 6), TileShape(2, 2, 3)
WINDOW = PatternSpec.make("sliding_tile", window=(1, 1, 1))
SPARSE = Plan(
    "window",
    (Rule(LayerPolicy(), noise=(0.9, 1.0)), Rule(LayerPolicy((HeadPolicy(WINDOW, compensation="pooled_tail"),)))),
    tile=TILE,
)


def tensors(tokens: int, batch: int = 2, heads: int = 3, channels: int = 16) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, heads, tokens, channels, generator=draw).transpose(1, 2) for _ in range(3))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int = 0) -> torch.Tensor:
    """The window by the reference, with the video cut out of the sequence and the other tokens behind it."""
    layout = TokenLayout.of(GRID, TILE, text_tokens=q.shape[1] - GRID.tokens)
    places = torch.arange(q.shape[1])
    video = layout_order(places[before : before + GRID.tokens])
    order = torch.cat([video, places[:before], places[before + GRID.tokens :]])
    from vidaccel.blockmask import BlockMask

    mask = BlockMask.from_dense(build_static(WINDOW).blocks(layout))
    found = reference.block_sparse_attention(*(x[:, order] for x in (q, k, v)), layout, mask, tail=True)
    out = torch.empty_like(found)
    out[:, order] = found
    return out


def layout_order(places: torch.Tensor) -> torch.Tensor:
    return TokenLayout.of(GRID, TILE).tile(places, dim=0)


@pytest.mark.parametrize(("text", "before"), [(0, 0), (7, 0), (7, 7), (7, 3)])
def test_it_runs_the_plan_by_noise_level(text: int, before: int) -> None:
    q, k, v = tensors(GRID.tokens + text)
    attention = vidaccel.Attention(SPARSE, strict=True)
    for level, wanted in ((0.95, exact(q, k, v)), (0.5, by_hand(q, k, v, before))):
        for layer in range(2):
            out = attention(q, k, v, grid=GRID, noise_level=level, layer=layer, before=before)
            assert_rounded(out, wanted, rounding(q, k, v).out)
    report = attention.report()
    assert (report.calls, report.sparse_calls) == (4, 2) and not report.fallbacks


def test_tokens_in_layout_order_and_a_scale() -> None:
    q, k, v = tensors(GRID.tokens)
    attention = vidaccel.Attention(SPARSE)
    layout = attention.layout(GRID)
    plain = attention(q, k, v, grid=GRID, noise_level=0.5)
    tiled = attention(*(layout.tile(x) for x in (q, k, v)), grid=tuple(GRID), noise_level=0.5, tiled=True)
    assert_rounded(layout.untile(tiled), plain, rounding(q, k, v).out)
    scaled = attention(q, k, v, grid=GRID, noise_level=0.95, scale=0.1)
    assert_rounded(scaled, exact(q, k, v, scale=0.1), rounding(q, k, v, 0.1).out)


def test_padding_is_left_out() -> None:
    q, k, v = tensors(GRID.tokens + 7)
    valid = torch.ones(2, GRID.tokens + 7, dtype=torch.bool)
    valid[0, -4:] = False
    out = vidaccel.attention(q, k, v, grid=GRID, plan=SPARSE, noise_level=0.5, mask=valid)
    short = vidaccel.attention(*(x[:1, :-4] for x in (q, k, v)), grid=GRID, plan=SPARSE, noise_level=0.5)
    assert_rounded(out[:1, :-4], short, rounding(q, k, v).out)
    assert not out[0, -4:].any() and torch.isfinite(out).all()


def test_memory_is_kept_by_layer_and_branch_and_a_rise_of_noise_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    reuse = PatternSpec.make("reuse", drift=0.0, pattern=PatternSpec.make("pooled_top_k", density=0.3))
    plan = Plan("reuse", (Rule(LayerPolicy((HeadPolicy(reuse),))),), tile=TILE)
    chosen: list[Any] = []
    from vidaccel.patterns import PooledTopK

    original = PooledTopK.choose
    monkeypatch.setattr(PooledTopK, "choose", lambda self, heads: chosen.append(1) or original(self, heads))
    q, k, v = tensors(GRID.tokens)
    attention = vidaccel.Attention(plan)
    for level in (0.8, 0.6, 0.4):
        for layer in (0, 1):
            for branch in ("cond", "uncond"):
                attention(q, k, v, grid=GRID, noise_level=level, layer=layer, branch=branch)
    assert len(chosen) == 4  # once for each layer and branch
    attention(q, k, v, grid=GRID, noise_level=0.9, layer=0, branch="cond")
    assert len(chosen) == 5
    with pytest.raises(ConfigError, match=r"remembers earlier calls, .* make a vidaccel.Attention"):
        vidaccel.attention(q, k, v, grid=GRID, plan=plan, noise_level=0.5)


def test_the_plugin_takes_a_mapping_or_attributes() -> None:
    q, k, v = tensors(GRID.tokens)
    wanted = vidaccel.attention(q, k, v, grid=GRID, plan=SPARSE, noise_level=0.5, scale=0.2)
    params = {"plan": SPARSE, "grid": GRID, "noise_level": 0.5}
    assert torch.equal(vidaccel.attention_plugin(q, k, v, params, False, 0.2), wanted)
    assert torch.equal(vidaccel.attention_plugin(q, k, v, SimpleNamespace(**params), False, 0.2), wanted)
    with pytest.raises(KernelError, match="no causal order"):
        vidaccel.attention_plugin(q, k, v, params, True)
    with pytest.raises(ConfigError, match="unknown keys sigma"):
        vidaccel.attention_plugin(q, k, v, {**params, "sigma": 1})
    with pytest.raises(ConfigError, match="params lacks noise_level"):
        vidaccel.attention_plugin(q, k, v, SimpleNamespace(plan=SPARSE, grid=GRID))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"grid": (3, 5)}, LayoutError, "give \\(frames, height, width\\)"),
        ({"grid": (3, 5, 7)}, LayoutError, "q has 90 tokens, of which 0 precede a 3x5x7 video of 105"),
        ({"before": 1}, LayoutError, "of which 1 precede"),
        ({"noise_level": 945.0}, ConfigError, "valid is 0 \\(clean\\) to 1"),
        ({"noise_level": float("nan")}, ConfigError, "the noise level is nan"),
        ({"branch": "both"}, ConfigError, "branch is 'both'; valid are None, cond, uncond"),
        ({"transformer": "unet"}, ConfigError, "transformer is 'unet'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], says: str) -> None:
    q, k, v = tensors(GRID.tokens)
    with pytest.raises(error, match=says):
        vidaccel.Attention(SPARSE)(q, k, v, **{"grid": GRID, "noise_level": 0.5, **change})


def test_bad_plans_and_what_cannot_run() -> None:
    q, k, v = tensors(GRID.tokens)
    with pytest.raises(ConfigError, match="neither a preset nor a plan file"):
        vidaccel.Attention("stha")
    with pytest.raises(ConfigError, match="no pattern is called 'magic'"):
        vidaccel.Attention(Plan.uniform("p", HeadPolicy(PatternSpec("magic"))))
    with pytest.raises(LayoutError, match="three \\[B,S,H,D\\] tensors of one shape"):
        vidaccel.Attention(SPARSE)(q, k[:, :-1], v, grid=GRID, noise_level=0.5)
    odd = torch.zeros(2, 1, GRID.tokens, GRID.tokens, dtype=torch.bool)
    with pytest.raises(StrictError, match="rules of its own for each query"):
        vidaccel.Attention(SPARSE, strict=True)(q, k, v, grid=GRID, noise_level=0.5, mask=odd)


def test_the_example_of_a_loop_written_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    own_loop.main()
    assert "plan sta: 42 of 48 attention calls sparse" in capsys.readouterr().out


@pytest.mark.full
def test_diffusers_is_not_imported() -> None:
    code = (
        "import sys, torch, vidaccel\n"
        "x = torch.randn(1, 90, 2, 16)\n"
        "vidaccel.attention(x, x, x, grid=(3, 5, 6), plan='sta', noise_level=0.5)\n"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
