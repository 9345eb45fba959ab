"""What each precision costs in accuracy: relative L2 error and cosine of attention against float64 with the same mask.

The masks are the same on both sides, so this is the error of the arithmetic alone, not of leaving blocks out. Few bits
are those of :mod:`vidaccel.kernels.emulated`, which rounds with exactly the scales of the kernels; tests hold it and
the kernels to the float64 oracle. Beside them: bf16 through ``torch-sparse`` and through plain eager attention.

Inputs are Gaussian; Gaussian with a few channels far from zero, as keys and values of video models have them; and q, k
and v captured from the shipped small model at three noise levels and layers.

    python -m benchmarks.precision [--json PATH]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.kernels import emulated, reference, torch_sparse
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Dense, Neighborhood, Radial, SlidingTile, StaticPattern
from vidaccel.types import PRECISIONS, Precision, TileShape, VideoGrid

from . import report_rows

GRID, TILE = VideoGrid(16, 12, 12), TileShape(4, 4, 4)
HEADS, HEAD_DIM = 3, 64
NOISE_LEVELS, LAYERS = (0.9, 0.6, 0.3), (0, 2, 5)
PATTERNS: tuple[StaticPattern, ...] = (
    Dense(),
    SlidingTile(window=(1.0, 0.5, 0.3)),
    Neighborhood(window=(0.6, 0.5, 0.3), stride="tile"),
    Radial(decay=0.2, floor=128, min_coverage=0.2),
)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One cell: ``error`` is the relative L2 error over all heads, ``cosine`` the mean over query rows."""

    inputs: str
    pattern: str
    precision: str
    error: float
    cosine: float


def gaussian(generator: torch.Generator) -> Tensors:
    """Standard normal q, k, v: float32 [1,S,H,D]."""
    shape = (1, GRID.tokens, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v


def outliers(generator: torch.Generator) -> Tensors:
    """The same, with 4 of 64 key channels around 8 and 4 value channels of ten times the spread."""
    q, k, v = gaussian(generator)
    k[..., :4] += 8 * torch.sign(torch.randn(1, 1, HEADS, 4, generator=generator))
    v[..., :4] *= 10
    return q, k, v


def captured(generator: torch.Generator) -> list[Tensors]:
    """q, k, v of some layers of the small model, denoising a rendered clip at some noise levels, in layout order."""
    from vidaccel import patch
    from vidaccel.engine import attend
    from vidaccel.engine.site import AttentionSite
    from vidaccel.pipelines.demo import DEMO_DIR
    from vidaccel.pipelines.demo.analytic_vae import encode_patches
    from vidaccel.pipelines.demo.build import embed_captions, load_pipeline
    from vidaccel.pipelines.demo.clips import HELD_OUT, render

    pipe = load_pipeline(DEMO_DIR)
    clean = encode_patches(pipe.vae, render(HELD_OUT[:1], generator)).detach()
    text = embed_captions(pipe, [HELD_OUT[0].caption], 32)
    layout = TokenLayout.of(GRID, TILE)
    found: list[Tensors] = []

    def record(site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        if site.layer in LAYERS:
            context = site.transformer.context
            tiled = context is not None and context.tiled
            found.append((q, k, v) if tiled else (layout.tile(q), layout.tile(k), layout.tile(v)))
        # dense: what is captured must not depend on the plan that brought us here; the order of keys does not matter
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    patch(pipe, "sta")
    with mock.patch.object(attend, "attend", record), torch.no_grad():
        for level in NOISE_LEVELS:
            noisy = torch.lerp(clean, torch.randn(clean.shape, generator=generator), level)
            pipe.transformer(noisy, torch.tensor([1000 * level]), text, return_dict=False)
    return found


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> torch.Tensor:
    """What all are compared with."""
    out = reference.block_sparse_attention(q, k, v, layout, mask, out_dtype=torch.float64)
    assert isinstance(out, torch.Tensor)
    return out


def eager_bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> torch.Tensor:
    """Masked attention written out in bf16, what a model without any kernel computes."""
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(HEAD_DIM)
    weights = scores.masked_fill(~mask.token_mask(layout), -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


def torch_sparse_bf16(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask
) -> torch.Tensor:
    """The gather path on bf16 inputs."""
    out = torch_sparse.block_sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, mask)
    assert isinstance(out, torch.Tensor)
    return out


def quantised(precision: Precision) -> Callable[..., torch.Tensor]:
    """A quantised precision on bf16 inputs, with the output rounded to bf16."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask
    ) -> torch.Tensor:
        out = emulated.block_sparse_attention(
            q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, mask, precision=precision
        )
        assert isinstance(out, torch.Tensor)
        return out

    return attention


def measure() -> list[Row]:
    """Every precision x pattern x kind of input."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "gaussian": [gaussian(generator)],
        "outliers": [outliers(generator)],
        "small model": captured(generator),
    }
    methods = {"eager bf16": eager_bf16, "native (torch-sparse bf16)": torch_sparse_bf16}
    methods |= {name: quantised(precision) for name, precision in PRECISIONS.items() if precision.quantised}
    layout = TokenLayout.of(GRID, TILE)
    rows = []
    for kind, samples in inputs.items():
        for pattern in PATTERNS:
            mask = pattern.mask(layout)
            exact = torch.cat([in_float64(*sample, layout, mask) for sample in samples])
            for name, method in methods.items():
                got = torch.cat([method(*sample, layout, mask) for sample in samples]).double()
                error = float((got - exact).norm() / exact.norm())
                cosine = float(torch.cosine_similarity(got, exact, dim=-1).mean())
                rows.append(Row(kind, pattern.name, name, error, cosine))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per input and precision, one column per pattern, relative L2 / 1 - cosine."""
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    cells = {(row.inputs, row.precision, row.pattern): f"{row.error:.1e} / {1 - row.cosine:.0e}" for row in rows}
    lines = ["| Inputs | Precision | " + " | ".join(patterns) + " |", "|---" * (2 + len(patterns)) + "|"]
    for inputs, precision in dict.fromkeys((row.inputs, row.precision) for row in rows):
        lines.append(f"| {inputs} | {precision} | " + " | ".join(cells[inputs, precision, p] for p in patterns) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.precision``."""
    report_rows.run(__doc__, measure, table, arguments)


if __name__ == "__main__":
    main()
