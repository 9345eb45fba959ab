"""Every kernel against the float64 oracle on the device it runs on: a table of cases and one judge.

The interpreter tests prove the same on a CPU, in small; here the real compiler, the real tensor cores and the sizes of
the shipped configurations come in. A native dtype must be as good as attention written out in that dtype, an 8-bit
precision must equal the oracle that rounds with the same scales. Outputs and padding are poisoned with NaN beforehand,
as far as the allocator hands the same memory out again.

    python -m benchmarks.gpu_correctness [--device cuda] [--kernel triton|triton-plain] [--json PATH]
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.files import write_json
from vidaccel.kernels import KernelRequest, kernels, variable
from vidaccel.kernels.contract import Kernel, Skips
from vidaccel.kernels.reference import block_sparse_attention as oracle
from vidaccel.layout import TokenLayout
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, Precision, TileShape, VideoGrid
from vidaccel.variablemask import VariableBlockMask

from .cuda_attention import FAILURES, Deadline, reason_of
from .cuda_run import NO_CUDA, environment, no_cuda
from .ours import PLAIN, gluon_serves, kernel_of, pieces_of
from .shapes import FORMATS

__all__ = ["CASES", "Case", "Verdict", "check", "check_all", "served_by_gluon"]

Mask = BlockMask | VariableBlockMask
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Every option at once that the named recipes do not combine, and one scale for a whole head.
_MORE = {
    "smooth-all": Precision("smooth-all", "int8", "fp8", "rows32", smooth_k=True, smooth_q=True, smooth_v=True),
    "tensor": Precision("tensor", "fp8", "fp8", "tensor", smooth_k=True, smooth_v=True),
}
_PRECISIONS = KERNEL_PRECISIONS | _MORE


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Args:
        name: what is special about it.
        precision: name of the precision.
        dtype: of q, k and v.
        grid, tile: of the video; with the defaults every axis has a short tile at its end.
        text: text tokens, before the video if ``text_first``.
        batch: B.
        densities: of each head.
        head_dim: D.
        tail, lse: whether they are asked for.
        skip: threshold of the in-kernel skip, ``None`` for none.
        strided: q, k and v are slices of one fused tensor that starts at an odd element.
        full: the mask keeps everything.
        variable: query and key blocks of each head, of random sizes, instead of the layout's.
    """

    name: str
    precision: str = "native"
    dtype: str = "bfloat16"
    grid: tuple[int, int, int] = (5, 14, 18)
    tile: tuple[int, int, int] = (2, 8, 8)
    text: int = 0
    text_first: bool = False
    batch: int = 1
    densities: tuple[float, ...] = (0.3, 0.6)
    head_dim: int = 64
    tail: bool = False
    lse: bool = True
    skip: float | None = None
    strided: bool = False
    full: bool = False
    variable: tuple[int, int] | None = None


def _cases() -> tuple[Case, ...]:
    """All cases, those that say most first: the time of a run may end before the table does."""
    found = []
    everything = {"text": 13, "batch": 2, "densities": (0.05, 0.5, 1.0), "head_dim": 128, "tail": True}
    features: dict[str, dict[str, Any]] = {
        "text, batch, uneven heads": everything,
        "full": {"full": True, "tail": True, "head_dim": 128},
        "skip": {"skip": -1.0, "densities": (0.6, 1.0)},
        "strided": {"strided": True, "densities": (0.5,)},
        "tiles of 384": {"grid": (7, 17, 16), "tile": (6, 8, 8), "head_dim": 128, "tail": True},
        "text first, no LSE": {"text": 70, "text_first": True, "head_dim": 128, "lse": False},
        "tiny tiles": {"grid": (5, 7, 9), "tile": (1, 4, 4), "text": 1},
        "skip tail": {"skip": -0.5, "tail": True, "head_dim": 128},
    }
    for (feature, options), precision in itertools.product(features.items(), FORMATS):
        found.append(Case(f"{precision} {feature}", precision, **options))
    for precision, tail in itertools.product(_PRECISIONS, (False, True)):
        found.append(Case(f"{precision}{' tail' if tail else ''}", precision, tail=tail))
    for dtype, tail in itertools.product(("float16", "float32"), (False, True)):
        found.append(Case(f"{dtype}{' tail' if tail else ''}", dtype=dtype, tail=tail))
    long: dict[str, Any] = {"grid": (9, 30, 30), "tile": (2, 8, 8), "densities": (0.2,), "head_dim": 128}
    found.append(Case("long lists", tail=True, **long))
    found.append(Case("long lists fp8", "fp8-tile", **long))
    for head_dim, precision in itertools.product((96, 128, 256), FORMATS):
        found.append(Case(f"{precision} D={head_dim}", precision, head_dim=head_dim, tail=head_dim == 128))
    found.append(Case("odd head dim", head_dim=20, tail=True))
    for tail, dtype in itertools.product((True, False), ("bfloat16", "float32")):
        name = f"{dtype} variable blocks{' tail' if tail else ''}"
        found.append(Case(name, dtype=dtype, batch=2, head_dim=128, variable=(9, 40), tail=tail))
    return tuple(found)


#: The table.
CASES: tuple[Case, ...] = _cases()


@dataclass(frozen=True)
class Verdict:
    """What came out of a case: ``status`` is ``ok``, ``wrong``, ``failed`` or ``skipped``."""

    case: Case
    status: str
    reason: str | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check(case: Case, kernel: Kernel, device: torch.device) -> Verdict:
    """Runs a case and judges it; what the kernel raises becomes the verdict ``failed``."""
    layout = TokenLayout.of(
        VideoGrid(*case.grid), TileShape(*case.tile), text_tokens=case.text, text_first=case.text_first, device=device
    )
    precision = _PRECISIONS[case.precision]
    tensors = _inputs(case, layout, device)
    mask = _mask(case, layout).to(device)
    q, k, v = tensors
    options: dict[str, Any] = {"tail": case.tail, "return_lse": case.lse}
    own = case.variable is not None
    request = KernelRequest.of(tensors[0], precision, skip=case.skip is not None, variable=own, **options)
    reason = kernel.why_not(request)
    if reason:
        return Verdict(case, "skipped", reason)
    skips = None
    if case.skip is not None:
        skips = replace(Skips.of(case.skip, q), pieces=pieces_of(kernel.name, q, layout, precision))
    _poison(tensors[0])
    try:
        result = kernel(q, k, v, layout, mask, precision=precision, skips=skips, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except FAILURES as error:
        return Verdict(case, "failed", reason_of(error))
    out, lse = result if isinstance(result, tuple) else (result, None)
    return _judged(case, tensors, layout, mask, precision, out, lse, skips)


def _judged(
    case: Case,
    tensors: Tensors,
    layout: TokenLayout,
    mask: Mask,
    precision: Precision,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    skips: Skips | None,
) -> Verdict:
    figures: dict[str, float] = {}
    faults: list[str] = []

    def hold(name: str, found: float, allowed: float) -> None:
        figures[name], figures[f"{name} allowed"] = found, allowed
        if not found <= allowed:  # NaN too
            faults.append(f"{name} is {found:.2e}, allowed {allowed:.2e}")

    if out.dtype != tensors[0].dtype or out.shape != tensors[0].shape:
        return Verdict(case, "wrong", f"the output is {out.dtype} {tuple(out.shape)}")
    counted = None if skips is None else replace(skips, skipped=torch.zeros_like(skips.skipped))
    exact, exact_lse = _oracle(tensors, layout, mask, case.tail, None, counted)
    if not precision.quantised:
        eager_out = _eager(tensors, layout, mask, case.tail) if skips is None else None
        error = (out.double() - exact).abs()
        unit = torch.finfo(out.dtype).eps * float(exact.abs().max())
        # the skip has no eager counterpart; an output that is rounded once is off by one unit, its weights by another
        allowed = 0.0 if eager_out is None else float((eager_out.double() - exact).abs().max())
        if out.dtype == torch.float32:
            # three tf32 products leave out the product of the low parts: 2^-22 of |q| |k| in each score
            q, k, v = tensors
            largest = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / math.sqrt(q.shape[-1])
            allowed += 2.0**-22 * largest * float(v.abs().max())
        hold("largest error", float(error.max()), 2 * allowed + 2 * unit)
    else:
        counted = None if skips is None else replace(skips, skipped=torch.zeros_like(skips.skipped))
        rounded, rounded_lse = _oracle(tensors, layout, mask, case.tail, precision, counted)
        ours, theirs = _distance(out, exact), _distance(rounded, exact)
        # the rounding of a 16-bit output comes on top of the oracle's, which returns float64
        output = torch.finfo(out.dtype).eps if out.dtype != torch.float32 else 1e-5
        # fp8 weights are rounded relative to the running maximum here and to the final one there; the kernel's tail
        # is rounded like the rest and the oracle's is not, which costs at most what the roundings cost elsewhere
        slack = (1.2 if precision.pv == "fp8" else 1.05) + (1.0 if case.tail else 0.0)
        hold("error over the oracle's", ours, slack * theirs + 2 * output)
        exact_lse = rounded_lse
    if lse is not None and not (case.tail and precision.quantised):
        q, k, _ = tensors
        # block means are rounded to the inputs' dtype: a logit moves by at most |q| |kmean| eps/2 / sqrt(D)
        means = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) / math.sqrt(q.shape[-1])
        moved = means * torch.finfo(q.dtype).eps / 2 if case.tail else 0.0
        scale = max(1.0, float(exact_lse.abs().max()))
        hold(
            "LSE error",
            float((lse.double() - exact_lse).abs().max()),
            moved + 64 * torch.finfo(torch.float32).eps * scale,
        )
    if skips is not None and counted is not None:
        # a score at the very threshold may fall on either side
        pairs = mask.density(layout) * layout.tokens**2 * out.shape[0] * out.shape[2]
        hold("skip counts differ by", float((skips.skipped - counted.skipped).abs().sum()), 0.002 * pairs)
    return Verdict(case, "wrong" if faults else "ok", "; ".join(faults) or None, figures)


def served_by_gluon(case: Case, device: torch.device) -> bool:
    """Whether ``triton`` takes the Gluon kernel for this case."""
    layout = TokenLayout.of(
        VideoGrid(*case.grid), TileShape(*case.tile), text_tokens=case.text, text_first=case.text_first
    )
    shape = (case.batch, layout.tokens, len(case.densities), case.head_dim)
    like = torch.empty(shape, dtype=getattr(torch, case.dtype), device=device)
    return gluon_serves(like, layout, _PRECISIONS[case.precision], skip=case.skip is not None)


def check_all(
    kernel: Kernel,
    device: torch.device,
    *,
    cases: Sequence[Case] = CASES,
    deadline: Deadline | None = None,
    report: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Every case; those that would begin after the deadline are ``skipped``."""
    found = []
    for case in cases:
        if deadline is not None and deadline.passed():
            verdict = Verdict(case, "skipped", "the time given was over")
        else:
            verdict = check(case, kernel, device)
        report(verdict)
        found.append(verdict)
    return found


def _inputs(case: Case, layout: TokenLayout, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shape = (case.batch, layout.tokens, len(case.densities), case.head_dim)
    plain = [torch.randn(shape, generator=generator) + mean for mean in (0.0, 0.7, 0.3)]
    if not case.strided:
        q, k, v = (x.to(device=device, dtype=dtype) for x in plain)
        return q, k, v
    fused = torch.full((*shape[:-1], 3 * case.head_dim + 1), math.nan, dtype=dtype, device=device)
    q, k, v = (fused[..., 1 + case.head_dim * i : 1 + case.head_dim * (i + 1)].copy_(x) for i, x in enumerate(plain))
    return q, k, v


def _mask(case: Case, layout: TokenLayout) -> Mask:
    n, heads = layout.num_blocks, len(case.densities)
    if case.variable is not None:
        return _variable_mask(case, case.variable, layout)
    if case.full:
        return BlockMask.from_dense(torch.ones(n, n, dtype=torch.bool))
    chance = torch.rand(case.batch, heads, n, n, generator=torch.Generator().manual_seed(1))
    return BlockMask.from_dense((chance < torch.tensor(case.densities)[:, None, None]) | torch.eye(n, dtype=torch.bool))


def _variable_mask(case: Case, blocks: tuple[int, int], layout: TokenLayout) -> VariableBlockMask:
    """Blocks of random sizes, some of them of no token at all, each query with its head's largest key block."""
    generator, heads = torch.Generator().manual_seed(1), (case.batch, len(case.densities))
    sizes = []
    for most in blocks:
        label = torch.randint(0, most, (*heads, layout.tokens), generator=generator)
        sizes.append(torch.nn.functional.one_hot(label, most).sum(-2))
    keep = torch.rand(*heads, *blocks, generator=generator) < torch.tensor(case.densities)[:, None, None]
    keep |= (sizes[1] == sizes[1].amax(-1, keepdim=True))[:, :, None]
    return VariableBlockMask(keep, *sizes)


def _poison(like: torch.Tensor) -> None:
    """Leaves freed memory full of NaN, so that rows nobody writes and padding that somebody reads are seen."""
    blocks = [
        torch.full((like.numel() * factor,), math.nan, dtype=like.dtype, device=like.device) for factor in (1, 1, 2)
    ]
    del blocks


def _oracle(
    tensors: Tensors,
    layout: TokenLayout,
    mask: Mask,
    tail: bool,
    precision: Precision | None,
    skips: Skips | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    options: dict[str, Any] = {"precision": precision or PRECISIONS["native"], "tail": tail, "skips": skips}
    options |= {"return_lse": True, "out_dtype": torch.float64}
    if isinstance(mask, VariableBlockMask):
        result = variable.oracle(*tensors, mask, **options)
    else:
        result = oracle(*tensors, layout, mask, **options)
    assert isinstance(result, tuple)
    return result


def _eager(tensors: Tensors, layout: TokenLayout, mask: Mask, tail: bool) -> torch.Tensor:
    """Masked attention written out in the inputs' dtype: what its error is, ours may be.

    float32 products are kept in float32: torch's default for CUDA.
    """
    q, k, v = (x.transpose(1, 2) for x in tensors)
    scale = 1 / math.sqrt(q.shape[-1])
    scores = (q @ k.mT * scale).masked_fill(~mask.token_mask(layout).to(q.device), -math.inf)
    if tail:
        if isinstance(mask, VariableBlockMask):
            k_means, v_means = (variable.variable_means(x, mask.kv_sizes).to(q.dtype) for x in tensors[1:])
            kept, sizes = mask.of_queries(), mask.kv_sizes[..., None, :]
        else:
            parts = layout.block_sizes.tolist()
            k_means, v_means = (torch.stack([p.mean(-2) for p in x.split(parts, dim=-2)], dim=-2) for x in (k, v))
            kept, sizes = mask.dense[:, :, layout.block_of_token.to(q.device)], layout.block_sizes.to(q.device)
        logits = q @ k_means.mT * scale + sizes.log().to(q.dtype)
        scores = torch.cat([scores, logits.masked_fill(kept, -math.inf)], dim=-1)
        v = torch.cat([v, v_means], dim=-2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.gpu_correctness``; returns 1 if a case is wrong or failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where to run (the torch-sparse kernel also runs on cpu)")
    parser.add_argument("--kernel", choices=[*(kernel.name for kernel in kernels()), PLAIN], default="triton")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write verdicts and environment here")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    reason = no_cuda() if device.type == "cuda" else None
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return NO_CUDA
    kernel = kernel_of(args.kernel)
    verdicts = check_all(kernel, device, report=lambda v: print(line(v), flush=True))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, environment(device) | {"kernel": kernel.name, "cases": [v.to_dict() for v in verdicts]})
    bad = sum(v.status in ("wrong", "failed") for v in verdicts)
    print(f"{len(verdicts)} cases: {sum(v.status == 'ok' for v in verdicts)} ok, {bad} wrong or failed")
    return 1 if bad else 0


def line(verdict: Verdict) -> str:
    """A verdict in one line."""
    figures = ", ".join(f"{k} {v:.1e}" for k, v in verdict.figures.items() if not k.endswith("allowed"))
    return f"{verdict.status:8}{verdict.case.name:45}{verdict.reason or figures}"


if __name__ == "__main__":
    raise SystemExit(main())
