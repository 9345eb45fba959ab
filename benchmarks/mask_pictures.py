"""A picture of the blocks that each pattern keeps, as contact sheets for the documentation.

Rows are blocks of queries, columns blocks of keys, both in the order of the layout; kept pairs are dark. Patterns that
choose their blocks do so for one head of one call captured from the small model, each as near to one density as its
setting allows; beside them the attention itself, summed over each pair of blocks. ``holds`` is the share of the
attention of that head that is in the kept blocks, mean over queries. Blocks of which a pattern masks some tokens are
lighter. Patterns that sort tokens in an order of their own are drawn in that order, and those whose blocks are clusters
by their tokens.

    python -m benchmarks.mask_pictures [--density .35] [--call 4] [--head 0] [--folder docs/assets]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vidaccel.blockmask import BlockMask
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy
from vidaccel.configs.presets import load_preset
from vidaccel.files import atomic_path
from vidaccel.layout import TokenLayout
from vidaccel.patterns import DynamicPattern, Heads, StaticPattern, build_pattern
from vidaccel.types import TileShape
from vidaccel.variablemask import VariableBlockMask

from .precision import GRID, Tensors, captured
from .system_knobs import DEEP, FLAT, LINES, SYSTEMS, TILE, Calls, chosen

__all__ = ["Panel", "attention_of_blocks", "chosen_panels", "draw", "static_panels"]

_COLUMNS = 6
#: How dark a block is of which the pattern masks some tokens.
_CUT = 0.45
#: Of blocks of the tokens' own sizes every so many tokens are drawn.
_EVERY = 4
_DENSE_COLOUR, _EMPTY = "#1f3a5f", "#e9edf2"

#: Patterns fixed by the grid, at settings that show their shape on a small one.
STATIC: dict[str, tuple[PatternSpec, TileShape]] = {
    "sliding_tile": (PatternSpec.make("sliding_tile", window=(1.0, 0.5, 0.3)), TILE),
    "sliding_tile, 3x1x1 tiles": (PatternSpec.make("sliding_tile", window=(3, 1, 1)), TILE),
    "neighborhood": (PatternSpec.make("neighborhood", window=(0.6, 0.5, 0.3), stride="tile"), TILE),
    "gna, exact": (PatternSpec.make("neighborhood", window=(0.6, 0.5, 0.3), stride="tile", exact=True), TILE),
    "radial": (PatternSpec.make("radial", decay=0.2, floor=0.08, min_columns=0.6), FLAT),
    "spatial_band": (PatternSpec.make("spatial_band", width=2.0, min_coverage=0.33), FLAT),
    "temporal_band": (PatternSpec.make("temporal_band", width=2.0, min_coverage=0.33), FLAT),
    "rettention's band": (load_preset("rettention").rules[-1].policy.heads[0].pattern, DEEP),
    "first_frame_sink": (PatternSpec.make("first_frame_sink"), FLAT),
    "first_places_sink": (PatternSpec.make("first_places_sink", min_coverage=0.33), LINES),
    "svg-static": (load_preset("svg-static").rules[-1].policy.heads[0].pattern, LINES),
}

#: Systems with the blocks of another one.
NOT_DRAWN = (
    *("dense", "sta", "neighborhood", "gna", "rectified-tail"),
    *("vsa-dropped", "delta", "razor", "tempcache", "rettention", "svg2-blocks"),
)


@dataclass(frozen=True)
class Panel:
    """One small picture.

    Args:
        title: the pattern.
        note: one line below it.
        cells: [queries, keys] in [0, 1], by blocks or by tokens: 1 is kept.
    """

    title: str
    note: str
    cells: NDArray[np.float64]


def static_panels() -> list[Panel]:
    """The patterns of :data:`STATIC` on the small model's grid."""
    found = []
    for title, (spec, tile) in STATIC.items():
        layout = TokenLayout.of(GRID, tile)
        pattern = build_pattern(spec)
        assert isinstance(pattern, StaticPattern)
        note = f"density {pattern.density(layout):.2f}, tile {layout.tile_shape}"
        cells = pattern.blocks(layout).double()
        if pattern.cuts_blocks:
            mask = pattern.mask(layout)
            assert mask.partial is not None
            cells = cells.masked_fill(mask.partial[0, 0], _CUT)
        found.append(Panel(title, note, cells.numpy()))
    return found


def chosen_panels(call: Tensors, density: float) -> list[Panel]:
    """The attention itself, and what each system keeps of it at about this density.

    Args:
        call: q, k, v of one head in layout order of :data:`TILE`.
    """
    captured_in = TokenLayout.of(GRID, TILE)
    known = Calls([call])
    found: list[Panel] = []
    for name, system in SYSTEMS.items():
        policy = system.make(system.high)
        if not isinstance(policy, HeadPolicy) or system.first is not None or name in NOT_DRAWN:
            continue
        made = system.make(known.knob(system, density))
        assert isinstance(made, HeadPolicy)
        layout = TokenLayout.of(GRID, system.tile)
        q, k, v = (x if layout is captured_in else layout.tile(captured_in.untile(x)) for x in call)
        mask, seen = _mask(made.pattern, Heads(q, k, v, layout))
        if not found:
            exact = attention_of_blocks(seen.q[0, :, 0], seen.k[0, :, 0], layout)
            found.append(Panel("attention itself", "by blocks, darker is more", exact / exact.max(1, keepdims=True)))
        found.append(_panel(name, mask, seen))
    return found


def _mask(spec: PatternSpec, heads: Heads) -> tuple[BlockMask | VariableBlockMask, Heads]:
    """What is kept, and the heads in the order of its blocks."""
    pattern = build_pattern(spec)
    if isinstance(pattern, StaticPattern):
        return pattern.mask(heads.layout), heads
    assert isinstance(pattern, DynamicPattern)
    return chosen(pattern, heads)


def _panel(title: str, mask: BlockMask | VariableBlockMask, heads: Heads) -> Panel:
    """Blocks of one size as one cell each, others by their tokens."""
    layout = heads.layout
    kept = mask.token_mask(layout)[0, 0]
    exact = ((heads.q[0, :, 0] * heads.scale) @ heads.k[0, :, 0].mT).softmax(-1)
    note = f"density {mask.density(layout):.2f}, holds {float((exact * kept).sum(-1).mean()):.2f}"
    cells = mask.dense[0, 0] if isinstance(mask, BlockMask) else kept[::_EVERY, ::_EVERY]
    return Panel(title, note, cells.double().numpy())


def attention_of_blocks(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> NDArray[np.float64]:
    """Attention of one head summed over key blocks, mean over the queries of each block; rows add up to 1.

    Args:
        q, k: [S, D] in layout order.

    Returns:
        float64 [NB, NB].
    """
    weights = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)
    block = layout.block_of_token
    by_keys = weights.new_zeros(len(q), layout.num_blocks).index_add_(1, block, weights)
    summed = weights.new_zeros(layout.num_blocks, layout.num_blocks).index_add_(0, block, by_keys)
    return np.asarray((summed / layout.block_sizes[:, None]).numpy())


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Writes the panels as one PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(1.75 * _COLUMNS, 0.5 + 2.15 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _paint(axes, panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.getvalue())


def _paint(axes: Axes, panel: Panel) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("kept", [_EMPTY, _DENSE_COLOUR])
    axes.imshow(panel.cells, vmin=0.0, vmax=1.0, cmap=colours, interpolation="nearest")
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.note, fontsize=7.5)
    axes.set_xticks([])
    axes.set_yticks([])


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.mask_pictures``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--density", type=float, default=0.35, help="of the patterns that choose their blocks")
    parser.add_argument("--call", type=int, default=4, help="which captured call is drawn")
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "docs" / "assets")
    options = parser.parse_args(arguments)
    shape = f"{GRID} tokens of the small model; rows are blocks of queries, columns blocks of keys"
    draw(options.folder / "masks-static.png", f"Patterns fixed by the grid, {shape}", static_panels())
    drawn = captured(torch.Generator().manual_seed(0))[options.call]
    q, k, v = (x[:, :, options.head : options.head + 1] for x in drawn)
    panels = chosen_panels((q, k, v), options.density)
    title = f"Patterns that look at queries and keys, one head of one call, {shape}"
    draw(options.folder / "masks-chosen.png", title, panels)


if __name__ == "__main__":
    main()
