"""Candidates that cannot be taken from sums over blocks are run, whole, on the calls that are looked at.

Sums over blocks hold for whole blocks in the layout's order, dropped or with the pooled tail. Everything else (other
compensations, own token orders, tokens masked inside blocks, skipping inside the kernel) is judged by what the kernel
and the compensation make of the call. What remembers earlier calls is run in every step, so that it remembers what it
would in a real run, and is judged in the chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..configs.plan import HeadPolicy, LayerPolicy
from ..engine.prepare import HeadGroup, is_stateful, prepare
from ..engine.run import run_heads
from ..engine.site import LayerCall
from ..errors import VidaccelError
from ..kernels.dispatch import select
from ..layout import TokenLayout
from ..patterns.base import StaticPattern
from ..patterns.dynamic import DynamicPattern, Heads
from ..patterns.registry import build_pattern

__all__ = ["Judged", "Runner", "judge", "must_run"]

_BY_SUMS = ("none", "pooled_tail")


def must_run(policy: HeadPolicy) -> bool:
    """Whether a candidate can only be judged by running it."""
    pattern = build_pattern(policy.pattern)
    if isinstance(pattern, StaticPattern):
        whole = not pattern.cuts_blocks
    else:
        assert isinstance(pattern, DynamicPattern)
        whole = type(pattern).order is DynamicPattern.order and not pattern.stateful
    return policy.compensation.name not in _BY_SUMS or policy.skip > 0 or not whole


class Runner:
    """Runs candidates on the calls of one generation.

    Args:
        policies: by number.
    """

    def __init__(self, policies: dict[int, HeadPolicy]) -> None:
        self.numbers = tuple(policies)
        self._policies = policies
        self._stateful = frozenset(number for number, policy in policies.items() if is_stateful(policy))
        self._groups: dict[tuple[int, int, TokenLayout], tuple[HeadGroup, ...]] = {}

    @property
    def stateful(self) -> bool:
        """Whether some candidate has to be run in every step."""
        return bool(self._stateful)

    def run(self, call: LayerCall, heads: Heads, out: torch.Tensor) -> dict[int, tuple[torch.Tensor, float]]:
        """Output [B,S,H,D] and density of every candidate in this call.

        Args:
            out: of dense attention.
        """
        return {number: self._one(number, call, heads, out) for number in self.numbers}

    def advance(self, call: LayerCall, heads: Heads, out: torch.Tensor) -> None:
        """Runs those that remember, for their memory alone."""
        for number in sorted(self._stateful):
            self._one(number, call, heads, out)

    def _one(self, number: int, call: LayerCall, heads: Heads, out: torch.Tensor) -> tuple[torch.Tensor, float]:
        policy = self._policies[number]
        key = (number, out.shape[2], heads.layout)
        if key not in self._groups:
            self._groups[key] = prepare(LayerPolicy((policy,)), out.shape[2], heads.layout)
        groups = self._groups[key]
        if not groups:  # it keeps everything here
            return out, 1.0
        (group,) = groups
        # by run and guidance branch, as in a patched run; other parts of a batch have other lengths
        memory = call.memory(("candidate", number, heads.layout.tokens))
        found, density = run_heads(select(group.request(heads.q)), group, heads, memory)
        if number not in self._stateful and any(memory.values()):
            raise VidaccelError(
                f"{policy} remembers earlier calls without saying so; its class must set stateful = True"
            )
        return found, density


@dataclass(frozen=True, eq=False)
class Judged:
    """One output against exact attention, sums over the sampled query tokens, as :class:`.evaluate.Scores` has them.

    Args:
        error, cosine: float64 [H].
        tokens: query tokens sampled.
    """

    error: torch.Tensor
    cosine: torch.Tensor
    tokens: int


def judge(
    heads: Heads, outs: Sequence[torch.Tensor], blocks: Sequence[int], *, metric: torch.Tensor | None = None
) -> list[Judged]:
    """Judges outputs of one sample on sampled query blocks.

    Args:
        heads: of a single sample.
        outs: each [S,H,D] in layout order.
        blocks: numbers of the query blocks.
        metric: see :func:`.evaluate.evaluate`.
    """
    offsets = heads.layout.block_offsets
    rows = torch.cat([torch.arange(int(offsets[b]), int(offsets[b + 1])) for b in blocks]).to(heads.q.device)
    q, k, v = (x[0].transpose(0, 1).float() for x in (heads.q, heads.k, heads.v))
    exact = torch.stack([((q[h, rows] @ k[h].mT) * heads.scale).softmax(-1) @ v[h] for h in range(q.shape[0])])
    judged = []
    for out in outs:
        found = out[rows].transpose(0, 1).float()
        apart = found - exact
        error = (apart * (apart if metric is None else apart @ metric)).sum((1, 2))
        cosine = torch.nn.functional.cosine_similarity(found, exact, dim=-1).sum(1)
        judged.append(Judged(error.double(), cosine.double(), len(rows)))
    return judged
