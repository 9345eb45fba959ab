"""Published few-bit recipes against their formulas written out token by token in float64.

Only what the formulas round is float32, as :mod:`vidaccel.kernels.quantise` promises. The yardstick is each recipe's
own error: what separates a kernel from the formula must be negligible against what the formula itself costs.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.helpers import make_layout, random_mask
from tests.rounding import assert_rounded, rounding
from vidaccel.blockmask import BlockMask
from vidaccel.kernels import emulated, reference
from vidaccel.layout import TokenLayout
from vidaccel.patterns import Neighborhood
from vidaccel.types import PRECISIONS, Precision

GRID, TILE = (5, 7, 9), (2, 4, 4)
LAYOUTS = {
    "video": make_layout(GRID, TILE),
    "text after": make_layout(GRID, TILE, text=37),
    "text before": make_layout(GRID, TILE, text=11, text_first=True),
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
DIM = 24  # the last group of 16 channels is short


@dataclass(frozen=True)
class Call:
    """One batch entry and head: q, k, v [S,D] float32, and which key blocks each query block keeps."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    keep: torch.Tensor

    def blocks(self) -> list[range]:
        return [range(a, b) for a, b in itertools.pairwise(self.layout.block_offsets.tolist())]


def fp4(x: torch.Tensor) -> torch.Tensor:
    """Rows [..., N] in groups of at most 16 values that share a scale."""
    groups = []
    for start in range(0, x.shape[-1], 16):
        part = x[..., start : start + 16].float()
        scale = (part.abs().amax(-1, keepdim=True) / 6).clamp(max=448).to(torch.float8_e4m3fn).float()
        nearest = ((part / scale).abs().double().unsqueeze(-1) - E2M1).abs().argmin(-1)
        sizes = torch.where(scale == 0, 0.0, E2M1[nearest] * scale.double())
        groups.append(torch.where(part < 0, -sizes, sizes))
    return torch.cat(groups, dim=-1)


def integer(x: torch.Tensor, most: int) -> torch.Tensor:
    """One group with one scale; halves go away from zero."""
    scale = x.float().abs().max() / most + 1e-7
    return torch.copysign((x.float() / scale).abs().add(0.5).floor(), x).double() * scale.double()


def float8(x: torch.Tensor, largest: float, range_: float) -> torch.Tensor:
    scale = torch.tensor(largest / range_, dtype=torch.float32)
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def by_32_rows(x: torch.Tensor, call: Call, most: int) -> torch.Tensor:
    parts = [integer(x[r.start : r.stop][i : i + 32], most) for r in call.blocks() for i in range(0, len(r), 32)]
    return torch.cat(parts)


def per_channel(v: torch.Tensor, one: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.stack([one(v[:, d]) for d in range(v.shape[1])], dim=1)


def p_fp8(p: torch.Tensor, call: Call, kept: list[range]) -> torch.Tensor:
    return float8(p, 1.0, 448.0)


def p_uint8(p: torch.Tensor, call: Call, kept: list[range]) -> torch.Tensor:
    return (p.float() * 255 + 0.5).floor().double() / 255


def p_fp4(p: torch.Tensor, call: Call, kept: list[range]) -> torch.Tensor:
    """Each row of a key block first stretched to 448 * 6, then in groups of 16."""
    parts, begin = [], 0
    for block in kept:
        part = p[begin : begin + len(block)].float()
        begin += len(block)
        first = part.max() / (448 * 6)
        parts.append(fp4(part / first) * first.double() if first > 0 else part.double())
    return torch.cat(parts)


def block_means(q: torch.Tensor, call: Call) -> torch.Tensor:
    return torch.cat([q[r.start : r.stop].double().mean(0).expand(len(r), -1) for r in call.blocks()])


def evened(q: torch.Tensor, k: torch.Tensor, pairs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = q.clone(), k.clone()
    for c in range(0, q.shape[1], 2 if pairs else 1):
        channels = slice(c, c + 2) if pairs else slice(c, c + 1)
        most_q, most_k = (max(float(row.norm()) for row in x[:, channels]) for x in (q, k))
        factor = math.sqrt(most_k / most_q)
        q[:, channels], k[:, channels] = q[:, channels] * factor, k[:, channels] / factor
    return q, k


Recipe = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, Callable[..., torch.Tensor]]


#: The emulated recipes of :func:`formula`.
WRITTEN_OUT = ("binary", "int4-fp8", "int4-fp8-channels", "int4-fp8-pairs", "int8-fp8-acc16", "nvfp4")


def own_file(recipe: str) -> str:
    """The module with the ``formula`` of a recipe that is not written out here."""
    return f"tests.kernels.formula_{recipe.replace('-', '_')}"


def formula(call: Call, recipe: str) -> Recipe:
    """q', k', the mean of each row's block or None, v' and the rounding of P; in a file of its own if not here."""
    if recipe not in WRITTEN_OUT:
        return importlib.import_module(own_file(recipe)).formula(call)  # type: ignore[no-any-return]
    q, k, v = call.q.double(), call.k.double(), call.v
    centred = k - k.mean(0)
    if recipe == "nvfp4":  # SageAttention3
        means = block_means(q, call)
        values = per_channel(v, lambda x: torch.cat([fp4(x[r.start : r.stop]) for r in call.blocks()]))
        return fp4(q - means), fp4(centred), means, values, p_fp4
    if recipe == "binary":  # BinaryAttention
        signs = [torch.where(x < 0, -1.0, 1.0).double() * x.abs().mean() for x in (q, k)]
        return signs[0], signs[1], None, per_channel(v, lambda x: integer(x, 127)), p_uint8
    v_range = 2.25 if recipe == "int8-fp8-acc16" else 448.0
    values = per_channel(v, lambda x: float8(x, float(x.abs().max()), v_range))
    if recipe == "int8-fp8-acc16":  # SageAttention2++
        return by_32_rows(q, call, 127), by_32_rows(centred, call, 127), None, values, p_fp8
    if recipe == "int4-fp8":  # SageAttention2
        means = block_means(q, call)
        return by_32_rows(q - means, call, 7), by_32_rows(centred, call, 7), means, values, p_fp8
    even_q, even_k = evened(q, centred, pairs=recipe.endswith("pairs"))  # FireQ
    return by_32_rows(even_q, call, 7), by_32_rows(even_k, call, 7), None, values, p_fp8


def written_out(call: Call, recipe: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [R,D] and LSE [R] of every third query, float64; ``None`` for exact attention."""
    scale = 1 / math.sqrt(call.q.shape[1])
    q, k = call.q.double(), call.k.double()
    centred = k - k.mean(0)
    shift = torch.zeros(len(q), dtype=torch.float64)
    if recipe is None:
        rounded_q, rounded_k, means, values = q, k, None, call.v.double()
    else:
        rounded_q, rounded_k, means, values, round_p = formula(call, recipe)
        if PRECISIONS[recipe].smooth_k:
            shift = scale * (q @ k.mean(0))
    out, lse = torch.zeros_like(q), torch.zeros_like(shift)
    for i, rows in enumerate(call.blocks()):
        kept = [block for j, block in enumerate(call.blocks()) if call.keep[i, j]]
        columns = [t for block in kept for t in block]
        for s in (s for s in rows if s % 3 == 0):
            scores = scale * (rounded_k[columns] @ rounded_q[s])
            if means is not None:
                scores = scores + scale * (centred[columns] @ means[s])
            p = (scores - scores.max()).exp()
            rounded = p if recipe is None else round_p(p, call, kept)
            out[s] = (rounded @ values[columns]) / p.sum()
            lse[s] = scores.max() + p.sum().log() + shift[s]
    return out[::3], lse[::3]


def inputs(layout: TokenLayout, batch: int = 2, heads: int = 2) -> tuple[tuple[torch.Tensor, ...], BlockMask]:
    """Non-contiguous q, k, v [B,S,H,D] with means and channels of unlike ranges, and a mask a sample and head."""
    made = torch.randn(3, batch, heads, DIM, layout.tokens).permute(0, 1, 4, 2, 3)
    spread = torch.logspace(-0.5, 0.5, DIM)[torch.randperm(DIM)]
    q, k, v = made[0] * spread, made[1] / spread + torch.randn(DIM), made[2] * spread + 0.3
    assert not q.is_contiguous()
    return (q, k, v), random_mask(layout, batch, [0.4, 0.7])


RECIPES = [name for name, precision in PRECISIONS.items() if precision.emulated]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", RECIPES)
def test_kernels_compute_the_published_formula(name: str, layout: TokenLayout) -> None:
    tensors, mask = inputs(layout)
    tight, tight_lse = reference.block_sparse_attention(
        *tensors, layout, mask, precision=PRECISIONS[name], return_lse=True, out_dtype=torch.float64
    )
    loose, loose_lse = emulated.block_sparse_attention(
        *tensors, layout, mask, precision=PRECISIONS[name], return_lse=True
    )
    for b, h in ((0, 0), (1, 1)):
        call = Call(*(x[b, :, h] for x in tensors), layout, mask.dense[b, h])
        (want, want_lse), (exact, exact_lse) = written_out(call, name), written_out(call, None)
        cost, lse_cost = (want - exact).abs(), (want_lse - exact_lse).abs()
        for out, lse, share in ((tight, tight_lse, 1e-3), (loose, loose_lse, 1e-2)):
            error, lse_error = (out[b, ::3, h] - want).abs(), (lse[b, h, ::3] - want_lse).abs()
            assert error.mean() <= share * cost.mean() and error.max() <= cost.max() / 10
            assert lse_error.mean() <= share * lse_cost.mean() + 1e-6


def test_every_emulated_recipe_is_written_out() -> None:
    assert set(WRITTEN_OUT) <= set(RECIPES)
    for name in set(RECIPES) - set(WRITTEN_OUT):
        path = f"{own_file(name).replace('.', '/')}.py"
        assert importlib.util.find_spec(own_file(name)), f"no formula of the precision {name}; write {path}"


@pytest.mark.parametrize("use_tail", [False, True], ids=["dropped", "tail"])
@pytest.mark.parametrize("precision", [p for p in PRECISIONS.values() if p.quantised], ids=lambda p: p.name)
def test_the_emulation_is_the_oracle_in_float32(precision: Precision, use_tail: bool) -> None:
    layout = LAYOUTS["text after"]
    tensors, mask = inputs(layout, batch=1)
    options = {"precision": precision, "tail": use_tail, "return_lse": True, "scale": 0.3}
    want, want_lse = reference.block_sparse_attention(*tensors, layout, mask, out_dtype=torch.float64, **options)
    exact, _ = reference.block_sparse_attention(
        *tensors, layout, mask, scale=0.3, tail=use_tail, return_lse=True, out_dtype=torch.float64
    )
    out, lse = emulated.block_sparse_attention(*tensors, layout, mask, **options)
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    assert (out - want).abs().mean() <= 1e-2 * (want - exact).abs().mean()
    assert_rounded(lse, want_lse, rounding(*tensors, 0.3).lse)


@pytest.mark.parametrize("name", ["int4-fp8", "nvfp4"])
def test_partial_blocks(name: str) -> None:
    """A rule over tokens cuts blocks; one for each head, or one for all."""
    layout = LAYOUTS["text before"]
    tensors, _ = inputs(layout, batch=1)
    window = Neighborhood(window=(3, 3, 5), exact=True).mask(layout)
    for mask in (window, BlockMask.stack([window, BlockMask.full(layout)], layout)):
        assert mask.rule is not None and mask.partial.any()
        want = reference.block_sparse_attention(
            *tensors, layout, mask, precision=PRECISIONS[name], tail=True, out_dtype=torch.float64
        )
        exact = reference.block_sparse_attention(*tensors, layout, mask, tail=True, out_dtype=torch.float64)
        out = emulated.block_sparse_attention(*tensors, layout, mask, precision=PRECISIONS[name], tail=True)
        assert isinstance(out, torch.Tensor) and isinstance(want, torch.Tensor) and isinstance(exact, torch.Tensor)
        assert (out - want).abs().mean() <= 1e-2 * (want - exact).abs().mean()


def test_one_mask_for_all_heads_and_samples() -> None:
    layout = LAYOUTS["video"]
    tensors, mask = inputs(layout)
    shared = BlockMask.from_dense(mask.dense[:1, :1])
    wide = BlockMask.from_dense(shared.dense.expand(2, 2, -1, -1))
    outs = [
        emulated.block_sparse_attention(*tensors, layout, one, precision=PRECISIONS["nvfp4"]) for one in (shared, wide)
    ]
    assert_rounded(outs[0], outs[1], rounding(*tensors).out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_in_its_own_dtype(dtype: torch.dtype) -> None:
    """Computed in float32, so only the inputs and the output are rounded: half a unit of the output."""
    layout = LAYOUTS["video"]
    tensors, mask = inputs(layout, batch=1)
    halves = [x.to(dtype) for x in tensors]
    out = emulated.block_sparse_attention(*halves, layout, mask, precision=PRECISIONS["int4-fp8"])
    wide = emulated.block_sparse_attention(*(x.float() for x in halves), layout, mask, precision=PRECISIONS["int4-fp8"])
    assert isinstance(out, torch.Tensor) and isinstance(wide, torch.Tensor) and out.dtype == dtype
    assert torch.equal(out, wide.to(dtype))


def error(name: str, tensors: tuple[torch.Tensor, ...], layout: TokenLayout, mask: BlockMask) -> float:
    want, got = (
        reference.block_sparse_attention(*tensors, layout, mask, precision=p, out_dtype=torch.float64)
        for p in (PRECISIONS["native"], PRECISIONS[name])
    )
    assert isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)
    return float((got - want).norm() / want.norm())


def test_what_each_recipe_is_for() -> None:
    """On channels of unlike ranges scaling them helps, and fewer bits cost more."""
    layout = LAYOUTS["video"]
    tensors, mask = inputs(layout, batch=1)
    found = {name: error(name, tensors, layout, mask) for name in PRECISIONS if name != "native"}
    assert found["int4-fp8-channels"] < found["int4-fp8-pairs"] < found["int4-fp8"]
    assert found["int8-fp8"] < found["int8-fp8-acc16"] < found["int4-fp8"] < found["binary"]
    assert found["int8-fp8"] < found["nvfp4"] < found["binary"]
