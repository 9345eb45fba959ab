"""What blocks cut from k-means clusters gain over tiles, and what they cost a kernel that computes in tiles.

q, k and v are captured from the small model (:func:`benchmarks.precision.captured`); clusters take 20 iterations.
``error`` is |out - dense| / |dense| with the pooled tail, mean over heads and calls. ``computed`` is what a kernel with
tiles of 64 queries by 64 keys multiplies over what the mask keeps: clusters have any size, and their last tile is
mostly empty. The gather path of a CPU computes what is kept.

    python -m benchmarks.clusters
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.blockmask import BlockMask
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.dispatch import select
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Clustered, DynamicPattern, ErrorRouting, Heads, PooledTopK, SvgEar
from vidaccel.types import PRECISIONS
from vidaccel.variablemask import VariableBlockMask

from .precision import GRID, Tensors, captured
from .system_knobs import TILE, chosen

__all__ = ["computed", "main", "patterns"]

DENSITIES = (0.11, 0.25, 0.5)
_ROWS = 64


def patterns(density: float) -> dict[str, DynamicPattern]:
    """What is compared, by the name of its row."""
    routing = ErrorRouting(aim=density)
    clusters = {"9 and 30, as published": (9, 30), "36 and 36": (36, 36), "36 and 72": (36, 72), "72 and 72": (72, 72)}
    return {
        "tiles by mass": PooledTopK(aim=density),
        "tiles by error": routing,
        "runs of sorted tokens by error": Clustered(pattern=routing, first=20),
        **{
            f"clusters by error, {name}": SvgEar(aim=density, queries=q, keys=k, first=20, exact=True)
            for name, (q, k) in clusters.items()
        },
    }


def computed(mask: BlockMask | VariableBlockMask, layout: TokenLayout) -> float:
    """Token pairs in the tiles that a kernel computes for a mask, over those that it keeps."""
    if isinstance(mask, VariableBlockMask):
        keep, rows, columns = mask.keep, mask.q_sizes, mask.kv_sizes
    else:
        keep, rows, columns = mask.dense, layout.block_sizes, layout.block_sizes
    whole = [(sizes + _ROWS - 1) // _ROWS * _ROWS for sizes in (rows, columns)]
    pairs = [((keep * keys[..., None, :]).sum(-1) * queries).sum() for queries, keys in (whole, (rows, columns))]
    return float(pairs[0] / pairs[1])


def _measured(pattern: DynamicPattern, call: Tensors, layout: TokenLayout) -> tuple[float, float, float]:
    """Density, error and :func:`computed` of one call."""
    mask, heads = chosen(pattern, Heads(*call, layout))
    kernel = select(KernelRequest.of(heads.q, PRECISIONS["native"], tail=True, variable=pattern.variable))
    out = kernel(heads.q, heads.k, heads.v, layout, mask, tail=True)
    assert isinstance(out, torch.Tensor)
    out = out if heads.order is None else heads.order.restore(out)
    q, k, v = (x.transpose(1, 2) for x in call)
    exact = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    off, all_of = (x.square().sum((0, 1, 3)).sqrt() for x in (out - exact, exact))
    return mask.density(layout), float((off / all_of).mean()), computed(mask, layout)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.clusters``."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    layout, calls = TokenLayout.of(GRID, TILE), captured(torch.Generator().manual_seed(0))
    print("| Blocks | " + " | ".join(f"error at {d:g} | computed" for d in DENSITIES) + " |")
    print("|---|" + "---|" * 2 * len(DENSITIES))
    for name in patterns(DENSITIES[0]):
        cells = []
        for density in DENSITIES:
            found = torch.tensor([_measured(patterns(density)[name], call, layout) for call in calls]).mean(0).tolist()
            assert abs(found[0] - density) < 0.01, (name, density, found)
            cells.append(f"{found[1]:.3f} | {found[2]:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
