"""Watches dense generations: in a few steps of each noise bin, scores every candidate on sampled query tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..configs.pattern_spec import PatternSpec
from ..engine.site import AttentionSite, LayerCall
from ..errors import VidaccelError
from ..layout import TokenLayout
from ..patterns.base import Pattern, StaticPattern
from ..patterns.dynamic import DynamicPattern, Heads, choose_blocks
from ..patterns.registry import build_pattern
from ..types import PRECISIONS
from .cells import Place, Sample
from .evaluate import Row, Scores, evaluate
from .running import Judged, Runner, judge, must_run

if TYPE_CHECKING:
    from .observations import Observations

__all__ = ["CandidateWatcher", "LevelWatcher", "noise_edges"]

#: Exact attention summed here and the model's own output may differ by the rounding of half precision, not by more.
_AGREEMENT = 0.05


@dataclass(eq=False)
class LevelWatcher:
    """Notes the noise level of each step and which transformer took it; scores nothing."""

    levels: dict[int, float] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    layout: TokenLayout | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    def wants(self, call: LayerCall) -> bool:
        """The first call, to see a shape."""
        self.levels[call.moment.step] = call.moment.noise_level
        self.owners[call.moment.step] = call.site.transformer.name
        return self.layout is None

    def observe(self, call: LayerCall, heads: Heads, out: torch.Tensor) -> None:
        """Keeps shapes."""
        self.layout, self.shape, self.dtype = heads.layout, tuple(out.shape), out.dtype


def noise_edges(levels: Mapping[int, float], owners: Mapping[int, str], bins: int) -> tuple[float, ...]:
    """Bounds of ``bins`` noise bins with about equally many of these levels each, halfway between two levels.

    Where the next step belongs to another transformer, a bin ends in any case, so that all steps of a bin are of one.

    Args:
        levels, owners: noise level and transformer of each step.
    """
    by_level = {level: owners.get(step, "") for step, level in levels.items()}
    ascending = sorted(by_level)
    bins = max(1, min(bins, len(ascending)))
    cuts = {round(i * len(ascending) / bins) for i in range(1, bins)}
    cuts |= {i for i in range(1, len(ascending)) if by_level[ascending[i]] != by_level[ascending[i - 1]]}
    return (0.0, *((ascending[c - 1] + ascending[c]) / 2 for c in sorted(cuts)), 1.0)


class CandidateWatcher:
    """Scores candidates in one generation.

    Args:
        seen: candidates, bins and tile.
        steps: numbers of the steps to look at.
        tiles: how many query tiles to sample a call, spread over the video.
        metrics: (transformer, layer) -> float32 [H,D,D], see :func:`~.evaluate.evaluate`; layers without one are
            measured at the attention output itself.
        seed: of the sampled tiles.
    """

    def __init__(
        self,
        seen: Observations,
        steps: Sequence[int],
        *,
        tiles: int,
        metrics: Mapping[tuple[str, int], torch.Tensor],
        seed: int,
    ) -> None:
        self._seen = seen
        self._steps = frozenset(steps)
        self._tiles = tiles
        self._metrics = metrics
        self._random = np.random.default_rng(seed)
        self._found: dict[Place, _Sums] = {}
        self._patterns: dict[PatternSpec, Pattern] = {}
        ran = {number: policy for number, policy in enumerate(seen.candidates) if must_run(policy)}
        self._runner = Runner(ran)
        self._summed = [number for number in range(len(seen.candidates)) if number not in ran]

    def wants(self, call: LayerCall) -> bool:
        """Calls of the chosen steps, and of every step if some candidate remembers the earlier ones."""
        return call.moment.step in self._steps or self._runner.stateful

    def observe(self, call: LayerCall, heads: Heads, out: torch.Tensor) -> None:
        """Scores all candidates on some tiles of each sample of the batch."""
        layout = heads.layout
        site, moment = call.site, call.moment
        name = site.transformer.name
        place = Place(self._seen.bin_of(moment.noise_level), name, site.layer, moment.branch or "")
        if moment.step not in self._steps:
            self._runner.advance(call, heads, out)
            return
        metric = self._metrics.get((name, site.layer))
        metric = None if metric is None else metric.to(out.device)  # offloading moves layers
        ran = self._runner.run(call, heads, out)
        for sample in range(out.shape[0]):
            one = heads.sample(sample)
            blocks = self._sampled(layout)
            rows, numbers = self._rows(one, blocks)
            scores = evaluate(one.q[0], one.k[0], one.v[0], layout, blocks, rows, metric=metric)
            self._check(site, one, out[sample], layout, blocks[0])
            sums = self._found.setdefault(place, _Sums(len(self._seen.candidates), out.shape[2]))
            for score, where in zip(scores, numbers, strict=True):
                sums.add(score, where, layout)
            judged = judge(one, [found[sample] for found, _ in ran.values()], blocks, metric=metric) if ran else []
            for (number, (_, density)), each in zip(ran.items(), judged, strict=True):
                sums.add_run(each, number, density)

    def samples(self) -> dict[Place, Sample]:
        """What this generation gave."""
        return {place: sums.sample() for place, sums in self._found.items()}

    def _sampled(self, layout: TokenLayout) -> list[int]:
        """Video blocks in even distances from a random start, so that every region of the clip is met."""
        count = min(self._tiles, layout.num_video_blocks)
        places = (np.arange(count) + self._random.random()) * layout.num_video_blocks / count
        return [layout.video_blocks.start + int(place) for place in places]

    def _rows(self, heads: Heads, blocks: list[int]) -> tuple[list[Row], list[list[int]]]:
        """The candidates that block sums can judge, grouped by precision, and their numbers."""
        members: dict[str, list[int]] = {}
        for number in self._summed:
            members.setdefault(self._seen.candidates[number].precision, []).append(number)
        rows, chosen = [], {}
        for precision, numbers in members.items():
            keeps = []
            for number in numbers:
                policy = self._seen.candidates[number]
                if policy.pattern not in chosen:  # one choice for all precisions and compensations
                    kept = self._keep(policy.pattern, heads)[:, blocks].to(heads.q.device)
                    chosen[policy.pattern] = kept.expand(heads.q.shape[2], -1, -1)
                keeps.append(chosen[policy.pattern])
            tails = [self._seen.candidates[number].tail for number in numbers]
            keep = torch.stack(keeps)
            rows.append(Row(PRECISIONS[precision], keep, torch.tensor(tails, device=keep.device)))
        return rows, list(members.values())

    def _keep(self, spec: PatternSpec, heads: Heads) -> torch.Tensor:
        """Blocks that a pattern keeps in this call, bool [1 or H, NB, NB]."""
        pattern = self._patterns.setdefault(spec, build_pattern(spec))
        if isinstance(pattern, StaticPattern):
            return pattern.blocks(heads.layout)[None]  # cached by the pattern itself
        assert isinstance(pattern, DynamicPattern)
        return choose_blocks(pattern, heads)[0]

    def _check(self, site: AttentionSite, heads: Heads, out: torch.Tensor, layout: TokenLayout, block: int) -> None:
        """Exact attention as it is summed here must be what the model computed, or every figure is wrong."""
        begin, end = (int(layout.block_offsets[block + i]) for i in (0, 1))
        q, k, v = (x[0].transpose(0, 1).float() for x in (heads.q, heads.k, heads.v))
        exact = ((q[:, begin:end] @ k.mT) * heads.scale).softmax(-1) @ v
        model = out[begin:end].transpose(0, 1).float()
        apart = float((exact - model).norm() / exact.norm().clamp_min(1e-20))
        if not apart <= _AGREEMENT:  # NaN is no agreement either
            raise VidaccelError(
                f"{site.transformer.name} layer {site.layer} computes something else than plain attention (it differs"
                f" by {apart:.0%}), so candidates cannot be judged there; leave this model to its own attention"
            )


class _Sums:
    """Sums over the calls of one cell."""

    def __init__(self, candidates: int, heads: int) -> None:
        self._each = {name: np.zeros((candidates, heads)) for name in ("error", "cosine", "mass", "density")}
        self._energy = np.zeros(heads)
        self._tokens = 0

    def add(self, scores: Scores, numbers: list[int], layout: TokenLayout) -> None:
        for name in ("error", "cosine", "mass"):
            self._each[name][numbers] += getattr(scores, name).cpu().numpy()
        # only video queries were sampled; those of other tokens are always dense
        video = layout.grid.tokens / layout.tokens
        kept = scores.pairs.cpu().numpy() / layout.tokens
        self._each["density"][numbers] += video * kept + (1 - video) * scores.tokens
        if 0 in numbers:  # energy and tokens are those of the exact output, the same for every precision
            self._energy += scores.energy.cpu().numpy()
            self._tokens += scores.tokens

    def add_run(self, judged: Judged, number: int, density: float) -> None:
        """A candidate that was run; which mass it kept is not known, and its density is the mean over heads."""
        self._each["error"][number] += judged.error.cpu().numpy()
        self._each["cosine"][number] += judged.cosine.cpu().numpy()
        self._each["density"][number] += density * judged.tokens

    def sample(self) -> Sample:
        """Means per query token."""
        each = {name: (total / self._tokens).astype(np.float32) for name, total in self._each.items()}
        return Sample(energy=(self._energy / self._tokens).astype(np.float32), **each)
