"""A run places its forward passes by noise level, and keeps what one stream of passes remembers from the others."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidaccel.engine.runs import DenoisingRun, Moment, RunBook

SITE: Any = object()


def look(run: DenoisingRun, level: float, name: str | None = None, **more: Any) -> Moment:
    return run.observe(level, "transformer", name=name, **more)


def schedule(*timesteps: float, index: int | None = None) -> Any:
    return SimpleNamespace(timesteps=torch.tensor(timesteps), _step_index=index)


def test_steps_follow_the_noise_level_and_not_the_calls() -> None:
    run = DenoisingRun()
    assert [look(run, level).step for level in (0.9, 0.9, 0.7, 0.7, 0.3)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("how", ["the level rises", "the schedule is set anew"])
def test_the_next_chunk_remembers_nothing(how: str) -> None:
    """Chunked pipelines run their schedule again; a chunk of one step is at the level of the chunk before."""
    run, scheduler = DenoisingRun(), schedule(0.9, index=0)
    for level in (0.9, 0.5) if how == "the level rises" else (0.9,):
        moment = look(run, level, scheduler=scheduler, own_loop=False)
    run.memory(SITE, moment.stream)["rest"] = 1
    run.curvature("transformer", moment).note(torch.ones(2))
    if how == "the schedule is set anew":
        scheduler.timesteps = torch.tensor([0.9])
    scheduler._step_index = None
    again = look(run, 0.9, scheduler=scheduler, own_loop=False)
    assert again.step == 0 and again.stream == (None, 0) and run.memory(SITE, again.stream) == {}
    run.curvature("transformer", again).note(torch.zeros(2))
    assert run.curvature("transformer", again).value is None


def test_timesteps_that_are_made_at_each_look_begin_nothing() -> None:
    class Lazy:
        @property
        def timesteps(self) -> torch.Tensor:
            return torch.tensor([0.9, 0.5])

    run = DenoisingRun()
    look(run, 0.9, scheduler=Lazy())
    assert look(run, 0.5, scheduler=Lazy()).step == 1


def test_step_sources_in_order() -> None:
    scheduler, run = schedule(0.9, 0.8), DenoisingRun()
    assert look(run, 0.9, scheduler=scheduler, own_loop=False).step == 0  # diffusers leaves it None until step()
    scheduler._step_index = 7
    assert look(run, 0.8, scheduler=scheduler, own_loop=False).step == 7
    assert look(run, 0.8, "cond", step=3, scheduler=scheduler, own_loop=False).step == 3


def test_a_loop_of_ones_own_does_not_go_by_a_scheduler_that_may_be_left_from_another() -> None:
    run, left = DenoisingRun(), schedule(0.9, 0.5, index=49)
    assert [look(run, level, scheduler=left).step for level in (0.9, 0.5)] == [0, 1]


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        *(("cond", "cond"), ("uncond", "uncond"), ("pred_cond", "cond"), ("pred_uncond", "uncond"), ("x", None)),
        *(("cond_uncond", None), ("uncond_stg", None), ("uncond_modality", None)),  # a batch of both, and other passes
    ],
)
def test_branch_from_the_cache_context(name: str, branch: str | None) -> None:
    assert look(DenoisingRun(), 0.9, name, in_order=True).branch == branch


def test_branch_from_the_order_of_passes_in_a_pipeline() -> None:
    run = DenoisingRun()
    found = [look(run, level, in_order=True, own_loop=False).branch for level in (0.9, 0.9, 0.8, 0.8)]
    assert found == ["cond", "uncond", "cond", "uncond"]
    assert look(DenoisingRun(), 0.9, own_loop=False).branch is None, "one batch holds both"
    assert look(DenoisingRun(), 0.9, in_order=True).branch is None, "nobody knows the order of a loop of one's own"


def test_a_second_evaluation_at_one_level_is_not_the_unconditional_pass() -> None:
    """Heun's method evaluates each level but the first twice, in two steps of the scheduler; no guidance here."""
    run, scheduler, found = DenoisingRun(), schedule(0.9, 0.7, 0.7, 0.4, 0.4), []
    for index, level in enumerate((0.9, 0.7, 0.7, 0.4, 0.4)):
        scheduler._step_index = index or None
        found.append(look(run, level, scheduler=scheduler, in_order=True, own_loop=False))
    assert {moment.branch for moment in found} == {"cond"} and {moment.stream for moment in found} == {(None, 0)}
    assert [moment.step for moment in found] == [0, 1, 2, 3, 4]


def test_streams_of_passes_remember_apart() -> None:
    run = DenoisingRun()
    for step, level in enumerate((0.9, 0.7)):
        for name in ("cond", "uncond"):
            memory = run.memory(SITE, look(run, level, name).stream)
            assert memory.get("by") == (None if step == 0 else name)
            memory["by"] = name


def test_passes_that_nobody_can_tell_apart_remember_nothing() -> None:
    """Three windows of a long video in one loop, whose run nobody has said."""
    run = DenoisingRun()
    for level in (0.9, 0.7):
        for window in range(3):
            moment = look(run, level)
            assert run.memory(SITE, moment.stream) == {}
            run.memory(SITE, moment.stream)["window"] = window
            run.curvature("transformer", moment).note(torch.ones(2) * window)
            assert run.curvature("transformer", moment).value is None
    assert run.crowded
    assert look(run, 0.9).stream == (None, 0) and not run.crowded, "the next run may be simple"
    pipeline = DenoisingRun()
    assert [look(pipeline, 0.9, own_loop=False).stream[1] for _ in range(5)] == [0, 1, 2, 3, 4]
    assert not pipeline.crowded, "the passes of a pipeline's step come in the same order in each"


def test_windows_with_a_run_each_remember() -> None:
    book = RunBook()
    windows = [book.begin(None) for _ in range(3)]
    for step, level in enumerate((0.9, 0.7)):
        for number, run in enumerate(windows):
            with run:
                assert book.current(None) is run
                memory = run.memory(SITE, look(run, level).stream)
                assert memory.get("window") == (None if step == 0 else number)
                memory["window"] = number
    assert book.current(None) is windows[-1], "outside of blocks the run that was begun last goes on"


def test_threads_have_runs_of_their_own() -> None:
    book, found = RunBook(), []
    mine = book.begin(None)
    with mine:
        other = threading.Thread(target=lambda: found.append(book.current(None)))
        other.start()
        other.join()
        assert book.current(None) is mine
    assert found[0] is not mine
