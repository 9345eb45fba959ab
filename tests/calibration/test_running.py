"""Candidates judged by running them: the same figures as from block sums, and memories as in a real run."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tiny_wan import tiny_wan
from vidaccel.calibration import observe
from vidaccel.calibration.observations import Observations
from vidaccel.calibration.observe import CandidateWatcher
from vidaccel.calibration.running import must_run
from vidaccel.calibration.survey import watching
from vidaccel.compensation import Call, Compensation
from vidaccel.compensation import registry as compensations
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy
from vidaccel.engine.prepare import is_stateful
from vidaccel.errors import VidaccelError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import registry as patterns
from vidaccel.patterns.dynamic import DynamicPattern, Heads
from vidaccel.pipelines.generate import Request, generate
from vidaccel.types import TileShape, VideoGrid

LAYOUTS = {
    "ragged": TokenLayout.of(VideoGrid(5, 7, 9), TileShape(2, 4, 4)),
    "text first": TokenLayout.of(VideoGrid(3, 4, 4), TileShape(2, 2, 2), text_tokens=11, text_first=True),
    "text last": TokenLayout.of(VideoGrid(3, 5, 4), TileShape(2, 2, 2), text_tokens=5),
}
WINDOW = PatternSpec.make("sliding_tile", window=[1, 1, 1])
POLICIES = tuple(
    HeadPolicy(spec, precision, compensation)
    for spec in (WINDOW, PatternSpec.make("pooled_top_k", density=0.4))
    for precision in ("native", "int8")
    for compensation in ("none", "pooled_tail")
)


def observations(*policies: HeadPolicy, tile: TileShape | None = None) -> Observations:
    return Observations((HeadPolicy(), *policies), tile, Fingerprint(), (0.0, 1.0), (4,), {})


def call(layout: TokenLayout, batch: int = 2, heads: int = 3) -> tuple[Any, Heads, torch.Tensor]:
    """A layer's call whose q, k and v are not contiguous, and its dense output."""
    base = torch.randn(3, batch, heads, layout.num_blocks, 16).repeat_interleave(layout.block_sizes, dim=3)
    q, k, v = base + 0.5 * torch.randn(3, batch, heads, layout.tokens, 16)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    moment = SimpleNamespace(step=0, noise_level=0.5, branch="cond")
    memories: dict[Any, dict[str, Any]] = {}
    site = SimpleNamespace(transformer=SimpleNamespace(name="transformer"), layer=0)
    made = SimpleNamespace(site=site, moment=moment, memory=lambda of: memories.setdefault(of, {}))
    return made, Heads(*(x.transpose(1, 2) for x in (q, k, v)), layout, noise_level=0.5), out


def watch(shown: Any, heads: Heads, out: torch.Tensor, metric: torch.Tensor) -> Any:
    seen = observations(*POLICIES)
    watcher = CandidateWatcher(seen, [0], tiles=4, metrics={("transformer", 0): metric}, seed=3)
    assert watcher.wants(shown)
    watcher.observe(shown, heads, out)
    (sample,) = watcher.samples().values()
    return sample


@pytest.mark.parametrize("name", LAYOUTS)
def test_running_and_block_sums_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, heads, out = call(LAYOUTS[name])
    root = torch.randn(3, 5, 16)
    metric = root.mT @ root
    by_sums = watch(shown, heads, out, metric)
    monkeypatch.setattr(observe, "must_run", lambda policy: not policy.is_dense)
    by_running = watch(shown, heads, out, metric)
    assert by_running.error[1:].min() > 0
    np.testing.assert_allclose(by_running.error, by_sums.error, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(by_running.cosine, by_sums.cosine, rtol=1e-4)
    np.testing.assert_allclose(by_running.energy, by_sums.energy)
    # running tells the density of all query blocks, not of the sampled ones; every head's the same
    assert (by_running.density[1:] == by_running.density[1:, :1]).all() and (by_running.density[1:] < 1).all()


def test_which_candidates_are_run() -> None:
    exact = PatternSpec.make("neighborhood", window=[3, 3, 3], exact=True)
    reuse = PatternSpec.make("reuse", pattern=PatternSpec.make("pooled_top_k", density=0.4))
    assert not any(must_run(policy) or is_stateful(policy) for policy in POLICIES)
    assert must_run(HeadPolicy(exact)) and not is_stateful(HeadPolicy(exact))
    assert must_run(HeadPolicy(reuse)) and is_stateful(HeadPolicy(reuse))
    assert must_run(HeadPolicy(WINDOW, skip=10.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Counting(Compensation):
    """Adds the number of earlier calls of this layer, branch and run to the output."""

    name: ClassVar[str] = "counting"
    lse: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    def attend(self, call: Call) -> torch.Tensor:
        number = call.memory.get("number", 0)
        call.memory["number"] = number + 1
        return call.full_with_lse()[0] + number


@dataclass(frozen=True, kw_only=True, eq=False)
class Forgetful(DynamicPattern):
    """Remembers, but does not say so."""

    name: ClassVar[str] = "forgetful"

    def choose(self, heads: Heads) -> torch.Tensor:
        heads.memory["seen"] = True
        return torch.ones(1, 1, heads.layout.num_video_blocks, heads.layout.num_video_blocks, dtype=torch.bool)

    def order(self, heads: Heads) -> None:
        return None

    def resolved(self, layout: TokenLayout) -> str:
        return "all"


def test_memories_are_those_of_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in every step, for each layer and guidance branch by itself, and forgotten in the next generation."""
    monkeypatch.setitem(compensations._REGISTRY.known, "counting", Counting)
    pipe = tiny_wan()
    seen = observations(HeadPolicy(WINDOW, compensation="counting"), tile=TileShape(2, 2, 2))
    arguments = {"height": 48, "width": 64, "num_frames": 17, "num_inference_steps": 4, "max_sequence_length": 16}
    for chosen in (0, 2):
        watcher = CandidateWatcher(seen, [chosen], tiles=100, metrics={}, seed=0)
        with watching(pipe, watcher, seen.tile):
            generate(pipe, Request("a red ball", 0, arguments))
        samples = watcher.samples()
        assert {(place.layer, place.branch) for place in samples} == {
            (layer, branch) for layer in (0, 1) for branch in ("cond", "uncond")
        }
        for sample in samples.values():
            # 16 channels, each off by the number of earlier steps
            np.testing.assert_allclose(sample.error[1], 16.0 * chosen**2, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(sample.density[1], 1.0)


def test_a_memory_that_is_not_declared_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(patterns._REGISTRY.known, "forgetful", Forgetful)
    shown, heads, out = call(LAYOUTS["ragged"])
    watcher = CandidateWatcher(
        observations(HeadPolicy(PatternSpec.make("forgetful"))), [0], tiles=2, metrics={}, seed=0
    )
    with pytest.raises(VidaccelError, match="forgetful remembers earlier calls without saying so"):
        watcher.observe(shown, heads, out)
