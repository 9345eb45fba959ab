"""BLASST's two calibrations: which scale factor skips a wanted share of the token pairs.

The kernel passes over a key block whose largest weight is below lambda = factor / L in a sequence of L tokens
(:class:`~vidaccel.kernels.contract.Skips`). A sweep measures, on captured q and k, what share each lambda passes over::

    sweep = measure(q, k, layout)                                  one for each captured call
    fit_inverse_length(sweeps, target=0.5).factor                  lambda nearest to the target, least squares on 1/L
    fit_exponential(sweeps).factor(target=0.5)                     factor = a exp(b target), over all lambdas at once

QK^T is computed before anything can be skipped, so the gain is bounded. Source: BLASST (skip-softmax attention).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..blockmask import BlockMask
from ..errors import ConfigError, KernelError
from ..kernels.contract import check_inputs
from ..layout import TokenLayout

__all__ = ["TRIALS", "Exponential", "InverseLength", "Sweep", "fit_exponential", "fit_inverse_length", "measure"]

#: The lambdas that are tried: from 1e-6 to .7, evenly on a logarithmic scale.
TRIALS: tuple[float, ...] = tuple(float(x) for x in np.geomspace(1e-6, 0.7, 25))

#: Most scores held at once.
_MAX_SCORES = 1 << 24


@dataclass(frozen=True)
class Sweep:
    """What each lambda skips in one call.

    Args:
        length: L, tokens of the sequence.
        thresholds: the lambdas, above 0 and at most 1.
        sparsity: for each, the token pairs passed over as a share of those that the mask keeps.

    Raises:
        ConfigError: if the lists differ in length or are empty, or a number is out of range.
    """

    length: int
    thresholds: tuple[float, ...]
    sparsity: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.sparsity) or not self.thresholds:
            raise ConfigError(
                f"a sweep has {len(self.thresholds)} thresholds and {len(self.sparsity)} sparsities; give one for each,"
                " and at least one"
            )
        if self.length < 1 or not all(0 < x <= 1 for x in self.thresholds):
            raise ConfigError(
                f"a sweep of length {self.length} has thresholds {self.thresholds}; a length is at least 1, a threshold"
                " above 0 and at most 1"
            )
        if not all(0 <= x <= 1 for x in self.sparsity):
            raise ConfigError(f"a sweep has sparsities {self.sparsity}; a sparsity is a share from 0 to 1")


@dataclass(frozen=True)
class InverseLength:
    """lambda = factor / L.

    Args:
        factor: what plans take as ``skip``.
        thresholds: the lambda of each sweep that came nearest to the target.
        sparsity: what it skipped there; far from the target where no lambda tried comes near it.
    """

    factor: float
    thresholds: tuple[float, ...]
    sparsity: tuple[float, ...]


@dataclass(frozen=True)
class Exponential:
    """lambda L = a exp(b sparsity).

    Args:
        a: the factor at which the first blocks are skipped.
        b: how fast it grows with the sparsity.
        residual: root mean square of the residuals of log(lambda L).
        used: how many measurements the fit is over.
    """

    a: float
    b: float
    residual: float
    used: int

    def factor(self, target: float) -> float:
        """What plans take as ``skip``, for a wanted share of skipped token pairs.

        Beyond the sparsities that were measured it extrapolates; a factor above L is no lambda.

        Raises:
            ConfigError: unless the target is a share in (0, 1).
        """
        _check_target(target)
        return self.a * math.exp(self.b * target)


def fit_inverse_length(sweeps: Sequence[Sweep], target: float) -> InverseLength:
    """The factor whose factor / L lies nearest, in least squares, to the lambda that each sweep wants.

    Of equally near lambdas a sweep wants the smallest, which skips the least important blocks.

    Raises:
        ConfigError: without a sweep, or unless the target is a share in (0, 1).
    """
    _check_target(target)
    if not sweeps:
        raise ConfigError("there is no sweep to fit a scale factor to; measure at least one call")
    wanted, reached = [], []
    for sweep in sweeps:
        pairs = zip(sweep.thresholds, sweep.sparsity, strict=True)
        threshold, sparsity = min(pairs, key=lambda pair: (abs(pair[1] - target), pair[0]))
        wanted.append(threshold)
        reached.append(sparsity)
    inverse = np.array([1 / sweep.length for sweep in sweeps])
    factor = float(inverse @ np.array(wanted) / (inverse @ inverse))
    return InverseLength(factor, tuple(wanted), tuple(reached))


def fit_exponential(sweeps: Sequence[Sweep], within: tuple[float, float] = (0.1, 0.9)) -> Exponential:
    """a and b of least squares on log(lambda L) over the measurements of all sweeps.

    Args:
        within: only measurements of a sparsity in this range are used. Near 0 and 1 many lambdas skip alike.

    Raises:
        ConfigError: if fewer than two different sparsities are in the range.
    """
    points = [
        (sparsity, math.log(threshold * sweep.length))
        for sweep in sweeps
        for threshold, sparsity in zip(sweep.thresholds, sweep.sparsity, strict=True)
        if within[0] <= sparsity <= within[1]
    ]
    if len({sparsity for sparsity, _ in points}) < 2:
        raise ConfigError(
            f"{len(points)} measurements skip between {within[0]:g} and {within[1]:g} of the token pairs; a fit needs"
            " two different sparsities there, so measure more lambdas or calls, or widen the range"
        )
    x, y = (np.array(column) for column in zip(*points, strict=True))
    centred = x - x.mean()
    b = float(centred @ (y - y.mean()) / (centred @ centred))
    log_a = float(y.mean() - b * x.mean())
    residual = float(np.sqrt(np.mean((y - log_a - b * x) ** 2)))
    return Exponential(math.exp(log_a), b, residual, len(points))


def measure(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: TokenLayout,
    thresholds: Sequence[float] = TRIALS,
    mask: BlockMask | None = None,
    *,
    scale: float | None = None,
) -> Sweep:
    """What each lambda would skip in this call, over all samples and heads: the counts of the reference's ``Skips``.

    A block that is passed over never holds a row's largest score, so one walk over the blocks serves every lambda.

    Args:
        q, k: [B,S,H,D] in layout order, on any device.
        mask: the kept blocks, ``None`` for all.
        scale: multiplies q k^T, ``None`` for 1/sqrt(D).

    Raises:
        LayoutError: if shapes, layout and mask do not fit together.
        KernelError: if q and k differ in dtype or device, or the mask has a rule over tokens.
        ConfigError: if a threshold is not above 0 and at most 1.
    """
    mask = BlockMask.full(layout) if mask is None else mask
    check_inputs(q, k, k, layout, mask)
    if mask.rule is not None:
        raise KernelError("the mask has a rule over tokens; measure skipping on whole blocks")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sizes = layout.block_sizes.to(q.device)
    limits = torch.tensor([math.log(x) if 0 < x <= 1 else math.nan for x in thresholds], device=q.device)
    if bool(limits.isnan().any()):
        raise ConfigError(f"thresholds are {tuple(thresholds)}; each is above 0 and at most 1")
    keep = mask.dense.to(q.device).expand(q.shape[0], q.shape[2], -1, -1)
    skipped = torch.zeros(len(limits), dtype=torch.int64, device=q.device)
    total = 0
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            nearest = _nearest(q[sample, :, head], k[sample, :, head], layout, keep[sample, head], scale)
            pairs = (sizes[:, None] * sizes)[keep[sample, head]]
            below = nearest[keep[sample, head]] < limits[:, None]
            skipped += (below * pairs).sum(-1)
            total += int(pairs.sum())
    return Sweep(layout.tokens, tuple(thresholds), tuple((skipped.double() / total).tolist()))


def _nearest(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, keep: torch.Tensor, scale: float) -> torch.Tensor:
    """How near each kept block [NB,NB] comes to the running maximum: over its rows, the largest of block maximum
    less maximum so far, in natural-log units; q and k are [S,D]."""
    block = layout.block_of_token.to(q.device)
    blocks = layout.num_blocks
    keys = k.float().T
    parts = []
    step = max(1, _MAX_SCORES // layout.tokens)
    for rows, of_row in zip(q.float().split(step), block.split(step), strict=True):
        scores = rows @ keys * scale
        local = scores.new_full((len(rows), blocks), -math.inf)
        local.scatter_reduce_(1, block.expand_as(scores), scores, "amax")
        local.masked_fill_(~keep[of_row], -math.inf)
        running = local.cummax(-1).values
        parts.append(local - running.masked_fill(running.isneginf(), 0.0))
    distance = torch.cat(parts)
    nearest = distance.new_full((blocks, blocks), -math.inf)
    return nearest.scatter_reduce_(0, block[:, None].expand_as(distance), distance, "amax")


def _check_target(target: float) -> None:
    if not 0 < target < 1:
        raise ConfigError(f"the target sparsity is {target!r}; give a share of the token pairs between 0 and 1")
