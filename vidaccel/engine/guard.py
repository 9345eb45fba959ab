"""Catches output that would turn a video black or wrong, and says which heads run dense from then on.

Every sparse output is looked at for non-finite and huge values and for heads that say the same for every token. If a
:class:`Guard` asks for it, some calls are compared with exact attention as well, on a few query rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ..configs.plan import HeadPolicy, LayerPolicy
from ..errors import ConfigError
from ..patterns.dynamic import Heads

__all__ = ["Guard", "HeadWatch", "bounded", "check_heads", "is_bounded", "what_is_wrong"]

_SAMPLED_TOKENS = 64
_DENSE = HeadPolicy()
#: Far above what trained layers give, and small enough for sums of products to stay finite in any dtype.
_LARGEST = 1e4
#: Squares of larger values overflow in the norms of the layers that follow.
_HUGE = 1e15
#: Steps of this share of the distance between rows visit every row in time, whatever the distance.
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Guard:
    """Comparison of sparse attention with exact attention while a pipeline runs, on samples.

    A head whose relative L2 error exceeds the limit runs dense for the rest of the run, in that call already, and the
    report says so; with ``strict=True`` it is an error. The next run begins anew, so a video does not depend on those
    made before. The look for non-finite, huge and flat output is always on.

    Args:
        every: of each layer's sparse calls in a run the first and every so many-th after it is compared; 0 compares
            none.
        rows: query rows, other ones each time, spread over the video. A comparison costs ``rows`` times the tokens
            products a head; ``python -m benchmarks.guard_overhead`` measures it.
        limit: largest relative L2 error of a head over those rows. 1 is that of an output of zeros.

    Raises:
        ConfigError: if a number is out of range.
    """

    every: int = 0
    rows: int = 16
    limit: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("rows", 1)):
            found = getattr(self, name)
            if not isinstance(found, int) or isinstance(found, bool) or found < least:
                raise ConfigError(f"Guard.{name} is {found!r}; give a whole number of at least {least}")
        number = isinstance(self.limit, int | float) and not isinstance(self.limit, bool)
        if not number or not 0 < self.limit < math.inf:
            raise ConfigError(f"Guard.limit is {self.limit!r}; give a relative error above 0, such as 1.0")


@dataclass(eq=False)
class HeadWatch:
    """What a :class:`Guard` found in one layer during one run.

    Args:
        calls: sparse calls so far.
        errors: head -> the error for which it runs dense.
    """

    calls: int = 0
    errors: dict[int, float] = field(default_factory=dict)
    _replaced: dict[LayerPolicy, LayerPolicy] = field(default_factory=dict)

    def is_due(self, guard: Guard) -> bool:
        """Counts a sparse call that begins; whether it is compared."""
        self.calls += 1
        return guard.every > 0 and (self.calls - 1) % guard.every == 0

    def exclude(self, errors: dict[int, float]) -> None:
        """These heads run dense from now on."""
        self.errors |= errors
        self._replaced.clear()

    def policy(self, planned: LayerPolicy, heads: int) -> LayerPolicy:
        """The plan's policy with the excluded heads dense."""
        if not self.errors:
            return planned
        if planned not in self._replaced:
            found = (_DENSE if head in self.errors else planned.for_head(head, heads) for head in range(heads))
            self._replaced[planned] = LayerPolicy(tuple(found))
        return self._replaced[planned]

    def reason(self, guard: Guard) -> str | None:
        """Why the layer does not run as planned, or ``None`` if no head is excluded."""
        if not self.errors:
            return None
        told = ", ".join(f"head {head} ({error:.3g})" for head, error in sorted(self.errors.items()))
        return f"guard: dense because their sampled error is above the limit {guard.limit:g}: {told}"


def check_heads(guard: Guard, watch: HeadWatch, heads: Heads, out: torch.Tensor) -> dict[int, float]:
    """Compares some rows of an output [B,S,H,D] in layout order with exact attention, and mends what is wrong.

    Returns:
        The errors of the heads that exceed the limit, by number in the layer; their part of ``out`` is exact now.
        Heads whose output or exact output is not finite are left to :func:`what_is_wrong`.
    """
    layout = heads.layout
    places = (torch.arange(guard.rows) + (watch.calls * _GOLDEN) % 1) / guard.rows * layout.grid.tokens
    rows = (places.long().clamp_(max=layout.grid.tokens - 1) + layout.video_start).unique().to(out.device)
    exact = _exact(heads, rows).float()
    apart = (out.index_select(1, rows).float() - exact).square().sum((0, 1, 3))
    errors = (apart / exact.square().sum((0, 1, 3)).clamp(min=1e-20)).sqrt()
    found = {h: error for h, error in enumerate(errors.tolist()) if math.isfinite(error) and error > guard.limit}
    if found:
        which = torch.tensor(sorted(found), device=out.device)
        out.index_copy_(2, which, _exact(heads.only(which), None).to(out.dtype))
    return {heads.members[place]: error for place, error in found.items()}


def _exact(heads: Heads, rows: torch.Tensor | None) -> torch.Tensor:
    """Attention of all query rows, or some, to every token: [B,R,H,D]."""
    q = heads.q if rows is None else heads.q.index_select(1, rows)
    q, k, v = (x.transpose(1, 2) for x in (q, heads.k, heads.v))
    return F.scaled_dot_product_attention(q, k, v, scale=heads.scale).transpose(1, 2)


def is_bounded(out: torch.Tensor) -> bool:
    """Whether all values are finite and no larger than what the model's norms can square."""
    return bool((out.abs() <= _HUGE).all())


def bounded(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its non-finite values at 0 and the others cut to sizes whose products stay finite."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).clamp(-_LARGEST, _LARGEST)


def what_is_wrong(out: torch.Tensor, v: torch.Tensor, first: int = 0) -> str | None:
    """Why an attention output cannot be right, or ``None``.

    A flat head is only wrong when its values differ from token to token: attention over constant values is constant.
    Inputs are not looked at: what does not reach the output does no harm, and reading them would cost three times as
    much as reading the output.

    Args:
        out: attention output [B, S, H, D].
        v: the values it was computed from, same shape.
        first: number in the layer of the first head.

    Returns:
        one phrase that names the first head concerned.
    """
    if not _is_suspicious(out):
        return None
    finite = torch.isfinite(out).all(dim=-1).all(dim=1)
    if not bool(finite.all()):
        batch, head = (~finite).nonzero()[0].tolist()
        return f"non-finite output in head {first + head} of batch entry {batch}"
    huge = (out.abs() > _HUGE).any(dim=-1).any(dim=1)
    if bool(huge.any()):
        batch, head = huge.nonzero()[0].tolist()
        return f"output above {_HUGE:g} in head {first + head} of batch entry {batch}"
    wrong = _flat(out) & ~_flat(v)
    if out.shape[1] > 1 and bool(wrong.any()):
        batch, head = wrong.nonzero()[0].tolist()
        return f"flat output in head {first + head} of batch entry {batch}"
    return None


def _is_suspicious(out: torch.Tensor) -> bool:
    """A cheap look with one wait for the device: one sum, which every NaN and Inf spoils, and a few tokens compared.

    It may cry wolf, because sums of large values are larger, but misses nothing: huge values do not cancel by chance.
    """
    spoiled = ~(out.sum(dim=(1, 3), dtype=torch.float32).abs() <= _HUGE)
    stride = max(1, out.shape[1] // _SAMPLED_TOKENS)
    return bool((spoiled | _flat(out[:, ::stride])).any())


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Heads whose tokens are all alike, bool [B, H]."""
    return (x == x[:, :1]).all(dim=-1).all(dim=1)
