"""Whether a kernel that no CPU can prove computes the right thing on this machine: a few cases, once, and a note of it.

:func:`examine` runs a kernel against the float64 oracle. :func:`verdict` does it at most once for one set of versions
and hardware and keeps the answer in the user's cache directory. :func:`in_own_process` is for kernels that could hang
or break the CUDA context: it takes a process that can be ended. Needs no Triton; any callable can be examined.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...blockmask import BlockMask
from ...device import cache_dir
from ...errors import OutputError, VidaccelWarning
from ...files import write_json
from ...layout import TokenLayout
from ...types import PRECISIONS, Precision, TileShape, VideoGrid
from .. import reference

__all__ = ["CASES", "Case", "Verdict", "examine", "in_own_process", "verdict"]

#: Fills out [B,S,H,D] and lse [B,H,S]: kernel(q, k, v, layout, mask, out, lse, precision=..., tail=...).
FillingKernel = Callable[..., None]

#: Longest time for the first compilation and all cases, in seconds.
_PATIENCE = 900

#: Largest relative error of one rounding to nearest.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float8_e4m3fn: 2.0**-4}


@dataclass(frozen=True)
class Case:
    """One call to check.

    Args:
        name: how a verdict calls it.
        grid: token grid (frames, height, width).
        tile: tile shape; edge tiles of uneven grids are ragged.
        densities: share of kept blocks, one for each head; 0 keeps the diagonal alone, a list of one piece.
        text: text tokens.
        batch: videos.
        head_dim: channels.
        dtype: of q, k, v.
        precision: name of a recipe.
        tail: whether the pooled tail is on.
    """

    name: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    densities: tuple[float, ...]
    text: int = 0
    batch: int = 1
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    precision: str = "native"
    tail: bool = False


_RAGGED: dict[str, Any] = {"grid": (5, 13, 11), "tile": (4, 6, 5), "text": 13}

#: Short, odd, long and uneven lists; blocks from 1 to 128 tokens; every variant that the kernel compiles differently.
CASES = (
    Case("bf16 ragged", **_RAGGED, batch=2, densities=(0.0, 0.4, 1.0)),
    Case("bf16 ragged tail", **_RAGGED, batch=2, densities=(0.0, 0.4, 1.0), tail=True),
    Case("bf16 uniform", (8, 16, 16), (4, 8, 4), (0.0, 0.5, 1.0)),
    Case("bf16 96 channels", **_RAGGED, densities=(0.1,), head_dim=96),
    Case("bf16 64 channels tail", **_RAGGED, densities=(0.1, 0.7), head_dim=64, tail=True),
    Case("fp16 uniform", (8, 8, 8), (4, 8, 4), (0.0, 1.0), dtype=torch.float16),
    Case("fp8 ragged", **_RAGGED, batch=2, densities=(0.0, 0.4, 1.0), precision="fp8-tile"),
    Case("fp8 uniform", (8, 16, 16), (4, 8, 4), (0.0, 1.0), precision="fp8-tile"),
    Case("fp8 ragged tail", **_RAGGED, densities=(0.0, 0.4), precision="fp8-tile", tail=True),
    Case("fp8 64 channels", **_RAGGED, densities=(0.3,), head_dim=64, precision="fp8-tile"),
)


@dataclass(frozen=True)
class Verdict:
    """What a self-test found.

    Args:
        passed: whether every case was right.
        reason: a sentence on the first thing that was wrong, ``None`` if nothing was.
        errors: largest error of each case that ran, as a share of what is allowed.
    """

    passed: bool
    reason: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"passed": self.passed, "reason": self.reason, "errors": dict(self.errors)}


def examine(kernel: FillingKernel, device: torch.device, cases: Sequence[Case] = CASES) -> Verdict:
    """Runs the cases until one is wrong. Every output begins as NaN and lies between rows that must stay NaN."""
    errors: dict[str, float] = {}
    for number, case in enumerate(cases):
        wrong, errors[case.name] = _check(kernel, device, case, seed=number)
        if wrong:
            return Verdict(False, f"case {case.name!r}: {wrong}", errors)
    return Verdict(True, None, errors)


def verdict(
    name: str, machine: Mapping[str, str], test: Callable[[], Verdict], folder: Path | None = None
) -> tuple[Verdict, bool]:
    """The kept verdict on kernel ``name`` for this ``machine``, or a fresh one, and whether it is fresh.

    Args:
        machine: all that the answer depends on: device, driver, versions, the kernel's source.
        test: makes a fresh verdict.
        folder: where verdicts are kept, ``None`` for the user's cache directory.
    """
    folder = cache_dir() / "self-test" if folder is None else folder
    digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.json"
    known = _kept(path, machine)
    if known is not None:
        return known, False
    made = test()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"kernel": name, "machine": dict(machine), **made.to_dict()})
    except (OSError, OutputError) as error:
        message = (
            f"the self-test of {name} will run again in the next process, because its verdict was not kept: {error}"
        )
        warnings.warn(message, VidaccelWarning, stacklevel=2)
    return made, True


def in_own_process(module: str, function: str, argument: str, seconds: float = _PATIENCE) -> Verdict:
    """Calls ``module.function(argument)`` in a fresh Python, which prints a verdict as its last line of JSON.

    A crash, a hang or any other ending without a verdict is a failed test.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {function}; {function}({argument!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"it did not end within {seconds:g} seconds")
    except OSError as error:
        return Verdict(False, f"a process for it could not be started: {error}")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            return _from_dict(json.loads(lines[-1]))
        except (ValueError, KeyError, TypeError):
            return Verdict(False, f"its process ended with {lines[-1][:200]!r} instead of a verdict")
    told = done.stderr.strip().splitlines()
    return Verdict(False, f"its process ended with code {done.returncode}: {told[-1][:300] if told else 'no message'}")


def _from_dict(data: Mapping[str, Any]) -> Verdict:
    passed, reason = data["passed"], data["reason"]
    if not isinstance(passed, bool) or not (reason is None or isinstance(reason, str)):
        raise TypeError("not a verdict")
    return Verdict(passed, reason, data["errors"])


def _kept(path: Path, machine: Mapping[str, str]) -> Verdict | None:
    """The verdict in a file, ``None`` if there is none or it is not about this machine."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _from_dict(data) if data["machine"] == dict(machine) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is made again, and the file written anew


def _check(kernel: FillingKernel, device: torch.device, case: Case, seed: int) -> tuple[str | None, float]:
    """What is wrong, and the largest error as a share of what is allowed."""
    layout = TokenLayout.of(VideoGrid(*case.grid), TileShape(*case.tile), text_tokens=case.text)
    random = torch.Generator().manual_seed(seed)
    n, heads = layout.num_blocks, len(case.densities)
    keep = torch.rand(case.batch, heads, n, n, generator=random) < torch.tensor(case.densities)[:, None, None]
    mask = BlockMask.from_dense(keep | torch.eye(n, dtype=torch.bool))
    shape = (case.batch, layout.tokens, heads, case.head_dim)
    # k and v have means, as real ones have; what lies around all three is NaN
    q, k, v = ((torch.randn(shape, generator=random) + shift).to(case.dtype) for shift in (0.0, 0.5, 0.3))
    operands = [_between_nan(x, device) for x in (q, k, v)]
    around = torch.full(
        (case.batch, layout.tokens + 2, heads, case.head_dim), math.nan, dtype=case.dtype, device=device
    )
    out = around[:, 1:-1]
    lse = torch.full((case.batch, heads, layout.tokens), math.nan, device=device)
    precision = PRECISIONS[case.precision]
    kernel(*operands, layout, mask.to(device), out, lse, precision=precision, tail=case.tail)
    made, made_lse, rim = out.cpu().double(), lse.cpu().double(), around.cpu()[:, [0, -1]]
    if not rim.isnan().all():
        return "rows outside of the output were written", math.inf
    if not (made.isfinite().all() and made_lse.isfinite().all()):
        missing = int((~made.isfinite()).sum() + (~made_lse.isfinite()).sum())
        return f"{missing} values of the output and the LSE are not finite", math.inf
    share, share_lse = _shares(q, k, v, layout, mask, made, made_lse, precision, case.tail)
    worst = max(share, share_lse)
    if not worst <= 1:
        what = "output" if share >= share_lse else "LSE"
        return f"the {what}'s error is {worst:.1f} times what its roundings allow", worst
    return None, worst


def _between_nan(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    batch, tokens, heads, channels = x.shape
    around = torch.full((batch, tokens + 2, heads, channels), math.nan, dtype=x.dtype, device=device)
    around[:, 1:-1] = x.to(device)
    return around[:, 1:-1]


def _shares(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    out: torch.Tensor,
    lse: torch.Tensor,
    precision: Precision,
    tail: bool,
) -> tuple[float, float]:
    """Largest error of the output and of the LSE, as shares of their bounds.

    A weight's relative error is at most that of rounding it, w, and twice the error E of a logit (its own and the
    sum's). So the output's is at most (w + 2E) sum(p |v|), which is the oracle's output for |v|, and its own rounding;
    the LSE's is at most E. Logits are sums of D products in units of at least 2^-21 of their size, or of 2^-12 in fp8,
    where tensor cores add four groups of products with 13 bits.
    """
    options: dict[str, Any] = {"return_lse": True, "out_dtype": torch.float64}
    exact, exact_lse = _oracle(q, k, v, layout, mask, tail=tail, **options)
    size = _largest_logit(q, k)
    finer = 2.0**-21 * math.sqrt(q.shape[-1])
    if not precision.quantised:
        unit = _ROUNDING[q.dtype]
        # means of keys and of values are rounded once more
        logit = size * (finer + (unit if tail else 0.0))
        weight = unit * (2 if tail else 1)
        amount, _ = _oracle(q, k, v.abs(), layout, mask, tail=tail, **options)
        bound = (weight + 2 * logit + 2.0**-16) * amount + unit * exact.abs() + 2.0**-24
        return float(((out - exact).abs() / bound).max()), float((lse - exact_lse).abs().max() / (logit + 2.0**-16))
    rounded, rounded_lse = _oracle(q, k, v, layout, mask, tail=tail, precision=precision, **options)
    logit = size * (finer + 4 * 2.0**-12)
    if tail:
        # the oracle's tail is not rounded; rounding it costs no more than rounding the rest does
        dropped, _ = _oracle(q, k, v, layout, mask, precision=precision, **options)
        kept, _ = _oracle(q, k, v, layout, mask, **options)
        allowed = _distance(rounded, exact) + _distance(dropped, kept)
        logit += size * _ROUNDING[torch.float8_e4m3fn] * 2  # k's and q's rounding
        return _distance(out, exact) / allowed, float((lse - exact_lse).abs().max() / logit)
    # P is rounded to 4 bits here relative to the running maximum and there to the final one, the smallest ones to a
    # fixed 2^-10 of the 448 that stand for 1
    amount, _ = _oracle(q, k, v.abs(), layout, mask, precision=precision, **options)
    small = layout.tokens * 2 * 2.0**-10 / 448 * v.abs().max().double()
    weight = 2 * _ROUNDING[torch.float8_e4m3fn]
    bound = (weight + 2 * logit) * amount + small + _ROUNDING[q.dtype] * rounded.abs()
    share = float(((out - rounded).abs() / bound).max())
    # and on the whole, as two independent roundings, no further apart than sqrt(2) times from the exact result
    share = max(share, _distance(out, rounded) / (1.42 * _distance(rounded, exact)))
    return share, float((lse - rounded_lse).abs().max() / (logit + 2.0**-16))


def _oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, LSE) in float64; for |v| the absolute values keep their scale."""
    out, lse = reference.block_sparse_attention(q, k, v, layout, mask, **options)
    return out, lse


def _largest_logit(q: torch.Tensor, k: torch.Tensor) -> float:
    """Largest sum of |q_c k_c| over channels, scaled."""
    products = q.float().abs().transpose(1, 2) @ k.float().abs().transpose(1, 2).mT
    return float(products.max()) / math.sqrt(q.shape[-1])


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2."""
    return float((a - b).norm() / b.norm())
