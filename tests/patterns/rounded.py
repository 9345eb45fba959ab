"""What a static pattern keeps against its formula at every pair of tokens, rounded to blocks by counting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.cases import layouts, run_cases, tile_members
from tests.patterns.formulas import Mask, Triple, coordinates, kept_tokens, round_out
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_static

__all__ = ["keeps_its_formula", "plain", "spec_of"]


def spec_of(name: str, params: dict[str, Any]) -> PatternSpec:
    """A pattern as plans name it; the members of a union are (name, params) pairs."""
    if name == "union":
        return PatternSpec.make(name, patterns=tuple(spec_of(n, p) for n, p in params["patterns"]))
    return PatternSpec.make(name, **params)


def plain(layout: TokenLayout) -> tuple[Triple, Triple]:
    """Grid and tile as formulas take them."""
    (f, h, w), (t, y, x) = layout.grid, layout.tile_shape
    return (f, h, w), (t, y, x)


def keeps_its_formula(
    name: str, params: st.SearchStrategy[dict[str, Any]], formula: Callable[..., Mask] | None = None
) -> None:
    """Random cases on small grids: blocks, densities and text.

    Args:
        name: the pattern.
        params: its parameters, ``min_coverage`` or ``min_columns`` among them where it has them.
        formula: which pairs of tokens it keeps, as the functions of ``formulas.py``; the one there if not given.
    """

    def check(layout: TokenLayout, params: dict[str, Any]) -> None:
        pattern = build_static(spec_of(name, params))
        keep, exact = _expected(name, params, layout, formula)
        assert torch.equal(pattern.video_blocks(layout), keep)
        sizes = torch.tensor([len(b) for b in tile_members(layout.grid, layout.tile_shape)])
        kept = int((keep * sizes[:, None] * sizes[None, :]).sum())
        assert pattern.exact_density(layout) == exact / layout.grid.tokens**2
        assert pattern.density(layout) == kept / layout.grid.tokens**2
        assert pattern.rounding(layout) == kept / exact
        whole = pattern.blocks(layout)
        video, text = layout.video_blocks, layout.text_blocks
        assert whole.shape == (layout.num_blocks, layout.num_blocks)
        assert torch.equal(whole[video, video], keep)
        assert bool(whole[text].all()) and bool(whole[:, text].all())

    run_cases(name, check, layout=layouts(most=160), params=params)


def _expected(
    name: str, params: dict[str, Any], layout: TokenLayout, formula: Callable[..., Mask] | None = None
) -> tuple[torch.Tensor, int]:
    """Kept pairs of video blocks by counting token pairs, and how many token pairs the formula keeps."""
    grid, tile = plain(layout)
    tokens = coordinates(grid)
    if formula is None:
        mask = kept_tokens(name, params, grid, tile, tokens, tokens)
    else:
        mask = formula(grid, tile, tokens, tokens, **params)
    blocks = tile_members(layout.grid, layout.tile_shape)
    if name == "union":  # every member is rounded by its own coverage
        keep = torch.stack([_expected(n, p, layout)[0] for n, p in params["patterns"]]).any(0)
    else:
        keep = torch.from_numpy(round_out(mask, blocks, params))
    return keep | torch.eye(len(blocks), dtype=torch.bool), int(mask.sum())
