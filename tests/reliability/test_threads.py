"""Many generations in threads, on shared and own transformers, of any size and plan: each is what it is alone."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import vidaccel
from tests.reliability.plans import REMEMBERS, SPARSE
from tests.zoo import cogvideox, hunyuan_video, wan
from tests.zoo.case import Case
from vidaccel import Guard, HeadPolicy, LayerPolicy, PatternSpec, Plan, Rule, TileShape
from vidaccel.configs.presets import preset_names

pytestmark = pytest.mark.full

THREADS = 4
T2V = wan.CASES[0]
SIZES = ((64, 96), (96, 64), (48, 80))
TOP_K = PatternSpec.make("pooled_top_k", density=0.4)
SP = HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1]))


def plan(name: str, policy: HeadPolicy, **more: Any) -> Plan:
    return Plan(name, (Rule(LayerPolicy((policy,)), **more),), tile=TileShape(1, 3, 3))


PLANS = {
    "dense": Plan.dense(),
    "sparse": SPARSE,
    "remembers": REMEMBERS,
    "curvature": plan("curvature", HeadPolicy(PatternSpec.make("pasa", density=0.4))),
    "clusters": plan("clusters", HeadPolicy(PatternSpec("svg2"))),
    "reuse": plan(
        "reuse", HeadPolicy(PatternSpec.make("reuse", pattern=PatternSpec.make("pooled_top_k", density=0.4)))
    ),
    "one branch": plan("one branch", SP, branch="cond"),
    "by heads": Plan("by heads", (Rule(LayerPolicy((SP, HeadPolicy(), SP))),), tile=TileShape(2, 2, 2)),
    "guarded": plan("guarded", HeadPolicy(TOP_K)),
}
OPTIONS: dict[str, dict[str, Any]] = {"guarded": {"guard": Guard(every=2, rows=9, limit=0.3)}}


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    """Threads change places a thousand times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@dataclass(frozen=True)
class Job:
    """One generation: by which plan, how large, from which noise."""

    plan: str
    size: tuple[int, int]
    seed: int
    case: Case = T2V

    def run(self, pipe: Any) -> torch.Tensor:
        """Nothing here touches random states that threads share."""
        call = self.case.call() | {"generator": torch.Generator().manual_seed(self.seed), "num_inference_steps": 2}
        if self.case is T2V:
            call |= {"height": self.size[0], "width": self.size[1]}
        return self.case.output(pipe(**call))


def made(case: Case, name: str) -> Any:
    pipe = case.make()
    vidaccel.patch(pipe, PLANS[name], strict=name != "guarded", **OPTIONS.get(name, {}))
    return pipe


@cache
def expected(job: Job) -> torch.Tensor:
    """With nothing else going on: in a new pipeline, in the main thread, with as many torch threads as there are."""
    return job.run(made(job.case, job.plan))


def sharing(pipe: Any) -> Any:
    """Another pipeline on the same models, as servers make them: the scheduler is its own.

    So are the tokenizers, which transformers sets anew in each call, whoever else uses them.
    """
    own = {n: copy.deepcopy(part) for n, part in pipe.components.items() if n.startswith(("scheduler", "tokenizer"))}
    other = type(pipe)(**{**pipe.components, **own})
    other.set_progress_bar_config(disable=True)
    return other


def in_threads(works: list[Callable[[], list[str]]]) -> list[str]:
    start = threading.Barrier(len(works))

    def run(work: Callable[[], list[str]]) -> list[str]:
        start.wait(timeout=60)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(itertools.chain.from_iterable(pool.map(run, works)))


@pytest.mark.parametrize("name", PLANS)
def test_one_transformer_in_two_threads(name: str) -> None:
    """Two sizes at once, on one patched transformer."""
    pipe = made(T2V, name)
    jobs = [[Job(name, size, seed) for seed in range(3)] for size in SIZES[:2]]
    for job in itertools.chain(*jobs):
        expected(job)

    def work(mine: list[Job]) -> Callable[[], list[str]]:
        own = sharing(pipe)
        return lambda: [str(job) for job in mine if not torch.equal(job.run(own), expected(job))]

    assert in_threads([work(mine) for mine in jobs]) == []
    assert any(
        not torch.equal(expected(Job(name, SIZES[0], seed)), expected(Job(name, SIZES[0], 0))) for seed in (1, 2)
    )


@pytest.mark.parametrize("case", [cogvideox.CASES[0], hunyuan_video.CASES[0]], ids=str)
def test_other_families_in_two_threads(case: Case) -> None:
    pipe = made(case, "remembers")
    jobs = [Job("remembers", (0, 0), seed, case) for seed in range(4)]
    for job in jobs:
        expected(job)

    def work(mine: list[Job]) -> Callable[[], list[str]]:
        own = sharing(pipe)
        return lambda: [str(job) for job in mine if not torch.equal(job.run(own), expected(job))]

    assert in_threads([work(jobs[:2]), work(jobs[2:])]) == []


def test_two_hundred_generations_in_four_threads() -> None:
    """Shared and own transformers, copies made and dropped, pipelines patched and unpatched meanwhile."""
    draw = random.Random(0)
    shared = {name: made(T2V, name) for name in PLANS}
    jobs = [Job(name, size, seed) for name in PLANS for size in SIZES for seed in range(2)]
    for job in jobs:
        expected(job)

    def work(seed: int) -> Callable[[], list[str]]:
        mine = random.Random(seed)
        todo = [mine.choice(jobs) for _ in range(50)]

        def run() -> list[str]:
            wrong = []
            own: dict[str, Any] = {}
            for job in todo:
                how = mine.choice(("shared", "shared", "own", "copy"))
                if how == "shared":
                    pipe = sharing(shared[job.plan])
                elif how == "own":
                    pipe = own.get(job.plan) or own.setdefault(job.plan, build(job.plan))
                else:
                    pipe = copy.deepcopy(sharing(shared[job.plan]))
                found = job.run(pipe)
                if how == "copy" and mine.random() < 0.5:
                    vidaccel.unpatch(pipe)
                if how == "own" and mine.random() < 0.3:
                    vidaccel.unpatch(own.pop(job.plan))
                if not torch.equal(found, expected(job)):
                    wrong.append(f"{how}: {job}")
            return wrong

        return run

    built = {name: [made(T2V, name) for _ in range(THREADS)] for name in PLANS}
    lock = threading.Lock()

    def build(name: str) -> Any:
        with lock:  # building draws from the random state that threads share
            pipe = built[name].pop() if built[name] else T2V.make()
        if vidaccel.session_of(pipe) is None:
            vidaccel.patch(pipe, PLANS[name], **OPTIONS.get(name, {}))
        return pipe

    assert in_threads([work(draw.randrange(1 << 30)) for _ in range(THREADS)]) == []
    for pipe in shared.values():
        session = vidaccel.session_of(pipe)
        assert session is not None and not session.closed
        report = session.report()
        assert report.calls == sum(sum(layer["kernels"].values()) for layer in report.layers), "no count is lost"
        vidaccel.unpatch(pipe)
    gc.collect()


def test_every_preset_remembers_by_run() -> None:
    """Two runs on one transformer that take turns step by step, under each preset: neither sees the other."""
    for name in preset_names():
        if name in ("vsa", "sla", "seer", "binary"):  # not without trained parts, or the same as another
            continue
        pipe = T2V.make()
        vidaccel.patch(pipe, name)
        others = [sharing(pipe), sharing(pipe)]
        runs = [Job("dense", size, 0) for size in SIZES[:2]]
        alone = [job.run(other) for job, other in zip(runs, others, strict=True)]
        turn = threading.Barrier(2)

        def together(job: Job, other: Any, turn: threading.Barrier = turn) -> torch.Tensor:
            call = job.case.call() | {"generator": torch.Generator().manual_seed(job.seed), "num_inference_steps": 2}

            def end_of_step(*_: Any) -> dict[str, Any]:
                turn.wait(timeout=60)
                return {}

            call |= {"height": job.size[0], "width": job.size[1], "callback_on_step_end": end_of_step}
            out: torch.Tensor = other(**call)[0]
            return out

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(together, runs, others))
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), name


def test_attention_without_a_model_in_two_threads() -> None:
    """Two generations of one ``vidaccel.Attention``, at two sizes, layer by layer and step by step."""
    grids, levels = ((3, 4, 6), (3, 6, 4)), (0.9, 0.6, 0.3)

    def generate(attention: vidaccel.Attention, grid: tuple[int, int, int]) -> torch.Tensor:
        draw = torch.Generator().manual_seed(grid[1])
        x = torch.randn(1, 72, 2, 16, generator=draw)
        for level in levels:
            for layer in range(3):
                for branch in ("cond", "uncond"):  # which take turns in each layer
                    x = attention(x, x, x, grid=grid, noise_level=level, layer=layer, branch=branch)
        return x

    alone = [generate(vidaccel.Attention(REMEMBERS), grid) for grid in grids]
    attention = vidaccel.Attention(REMEMBERS)
    for _ in range(3):
        start = threading.Barrier(2)

        def run(grid: tuple[int, int, int], start: threading.Barrier = start) -> torch.Tensor:
            attention.new_run()
            start.wait(timeout=60)
            return generate(attention, grid)

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(run, grids))
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
