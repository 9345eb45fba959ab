"""What rounding explains of the difference between two computations that sum in another order.

A test of results that may differ in the order of a sum takes its tolerance from here, because processors sum in
orders of their own. For one attention the bound follows from its numbers. A model is harder to know. A processor with
other vector units, or a kernel that takes keys in blocks, rounds attention otherwise by about one unit in the last
place; what a model makes of that is its own: some move by 1e-6, some by 5e-5. So a pipeline runs again with each
attention output moved by up to one unit, and the bound is a multiple of the largest movement. Wrong blocks move the
same outputs by a tenth of their size and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from tests.zoo.case import Case

__all__ = ["Rounding", "assert_rounded", "bound_of", "bound_of_case", "distance", "rounding"]

#: Over 115 runs of the zoo the errors were .1 to 4.9 times the largest of two movements; both have long tails.
_TIMES = 10
_DRAWS = 2


class _Moved(TorchFunctionMode):
    """Moves attention outputs by up to one unit in their last place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draw = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return out
        units = 2 * torch.rand(out.shape, generator=self._draw) - 1
        return (out * (1 + units * torch.finfo(out.dtype).eps)).to(out.dtype)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two results."""
    return float((found.double() - expected.double()).abs().max())


def bound_of(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> float:
    """The largest difference from ``expected`` that rounding explains.

    Args:
        run: what gave ``expected``, through torch's own attention.
    """
    moved = []
    for seed in range(_DRAWS):
        with _Moved(seed):
            moved.append(distance(run(), expected))
    assert min(moved) > 0, "no attention output was moved, so nothing is known of rounding"
    return _TIMES * max(moved)


@cache
def bound_of_case(case: Case) -> float:
    """The same for a pipeline of the zoo with its own, dense attention."""
    return bound_of(lambda: case.run(case.make()), case.run(case.make()))


class Rounding(NamedTuple):
    """The largest errors of an attention, in whatever order it sums."""

    out: float
    lse: float


def rounding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> Rounding:
    """What rounding explains of the difference between two float32 attentions of the same q, k and v [B,S,H,D].

    A sum of n products in any order is off by at most 4 sqrt(n) u times the sum of their sizes but in one case of a
    thousand, u half a unit in the last place (N. Higham and T. Mary, https://doi.org/10.1137/18M1226312, theorem
    2.4). So a logit is off by e, a probability by the factor exp(2e) and its own sum, and the output by that of the
    largest value; twice, because either side may be off. Means of skipped blocks are further keys, at most as many
    as there are.
    """
    assert q.dtype is torch.float32, "of 16 bits the error of eager attention says more"
    u, (tokens, dim) = torch.finfo(q.dtype).eps / 2, (k.shape[1], q.shape[-1])
    scale = dim**-0.5 if scale is None else scale
    sizes = torch.einsum("bihd,bjhd->bhij", q.double().abs(), k.double().abs())
    logit = float(sizes.max()) * scale
    e = (4 * math.sqrt(dim) + 2) * u * logit
    total = (4 * math.sqrt(2 * tokens) + 3) * u
    largest = float(v.double().abs().max())
    return Rounding(2 * (2 * e + 2 * total) * largest, 2 * (e + total + u * (logit + math.log(tokens))))


def assert_rounded(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """That two results differ by no more than rounding explains."""
    off = distance(found, expected)
    assert off <= bound, f"off by {off:.2e}, and rounding explains {bound:.2e}"
