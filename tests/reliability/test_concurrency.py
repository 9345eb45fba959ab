"""Two pipelines at once, a pipeline inside a callback of itself, and patching at the wrong moment."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

import vidaccel
from tests.zoo.wan import CASES
from vidaccel import HeadPolicy, LayerPolicy, PatchError, PatternSpec, Plan, Rule, TileShape

pytestmark = pytest.mark.full

T2V = CASES[0]
PLANS = {
    "window": HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1]), compensation="pooled_tail"),
    "stateful": HeadPolicy(PatternSpec.make("pooled_top_k", density=0.3), compensation="rettention"),
}


def plan(name: str) -> Plan:
    tile = TileShape(2, 2, 2) if name == "window" else TileShape(1, 3, 3)
    return Plan(name, (Rule(LayerPolicy((PLANS[name],))),), tile=tile)


def arguments() -> dict[str, Any]:
    """Of a call; everything random comes from its own generator, so threads do not share a random state."""
    return T2V.call()


@cache
def alone(name: str) -> torch.Tensor:
    """What a plan generates with nothing else going on."""
    pipe = T2V.make()
    vidaccel.patch(pipe, plan(name), strict=True)
    return pipe(**arguments())[0]


def patched(name: str) -> tuple[Any, Any]:
    pipe = T2V.make()
    return pipe, vidaccel.patch(pipe, plan(name), strict=True)


def test_two_pipelines_in_two_threads() -> None:
    (first, a), (second, b) = patched("window"), patched("stateful")
    start = threading.Barrier(2)

    def run(pipe: Any) -> torch.Tensor:
        start.wait(timeout=60)
        for _ in range(3):
            out = pipe(**arguments())[0]
        return out

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (first, second)))
    assert torch.equal(found[0], alone("window"))
    assert torch.equal(found[1], alone("stateful"))
    assert not torch.equal(*found)
    for session in (a, b):
        assert session.report().sparse_calls == session.report().calls == 3 * 12


def test_two_pipelines_step_by_step() -> None:
    """One step of the one, one of the other: their threads take turns at the end of every step."""
    pipes = {name: patched(name)[0] for name in PLANS}
    turn = {"of": "window"}
    changed = threading.Condition()
    order: list[str] = []

    def run(name: str) -> torch.Tensor:
        other = next(n for n in PLANS if n != name)

        def end_of_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            with changed:
                order.append(name)
                turn["of"] = other
                changed.notify_all()
                if step < 2:
                    assert changed.wait_for(lambda: turn["of"] == name, timeout=60)
            return {}

        with changed:
            assert changed.wait_for(lambda: turn["of"] == name, timeout=60)
        return pipes[name](**arguments(), callback_on_step_end=end_of_step)[0]

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(PLANS, pool.map(run, PLANS), strict=True))
    assert order == ["window", "stateful"] * 3
    for name in PLANS:
        assert torch.equal(found[name], alone(name))


def test_a_pipeline_called_from_a_callback_of_another() -> None:
    outer, inner = patched("stateful")[0], patched("window")[0]
    seen: list[torch.Tensor] = []

    def end_of_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(inner(**arguments())[0])
        return {}

    found = outer(**arguments(), callback_on_step_end=end_of_step)[0]
    assert torch.equal(found, alone("stateful"))
    assert len(seen) == 3 and all(torch.equal(video, alone("window")) for video in seen)


@pytest.mark.parametrize("name", PLANS)
def test_a_transformer_called_again_from_a_callback(name: str) -> None:
    """Previews and corrections: a second pipeline on the same patched transformer, with a scheduler of its own.

    What patterns and compensations remember belongs to one run, so neither sees the other.
    """
    pipe, session = patched(name)
    shared = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    shared.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []

    def end_of_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            seen.append(shared(**arguments())[0])
        return {}

    found = pipe(**arguments(), callback_on_step_end=end_of_step)[0]
    assert torch.equal(seen[0], alone(name))
    assert torch.equal(found, alone(name))
    assert session.report().sparse_calls == session.report().calls == 24


def refused(what: Callable[[], Any]) -> str:
    with pytest.raises(PatchError) as caught:
        what()
    return str(caught.value)


def elsewhere(what: Callable[[], Any]) -> Any:
    """The same in another thread, for which this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(what).result(timeout=60)


@pytest.mark.parametrize("thread", [False, True], ids=["callback", "other thread"])
def test_patching_a_running_pipeline_is_refused(thread: bool) -> None:
    pipe, session = patched("window")
    bare = T2V.make()
    told: list[str] = []

    def ask(what: Callable[[], Any]) -> None:
        told.append(elsewhere(lambda: refused(what)) if thread else refused(what))

    def patch_now(running: Any, *_: Any) -> dict[str, Any]:
        ask(lambda: vidaccel.patch(running, plan("window")))
        return {}

    def unpatch_now(running: Any, *more: Any) -> dict[str, Any]:
        ask(lambda: vidaccel.unpatch(running))
        return patch_now(running, *more)

    found = pipe(**arguments(), callback_on_step_end=unpatch_now)[0]
    assert torch.equal(found, alone("window")) and not session.closed
    whats = ["unpatch", "patch"] * 3
    if not thread:
        bare(**arguments(), callback_on_step_end=patch_now)
        assert vidaccel.session_of(bare) is None
        whats += ["patch"] * 3
    where = "in another thread" if thread else "in a callback of it"
    assert told == [
        f"WanPipeline is running, and this {what} came {where}; call vidaccel.{what}(pipe) before or after the run"
        for what in whats
    ]


def test_a_first_patch_in_another_thread_holds_from_the_next_pass() -> None:
    pipe = T2V.make()
    dense = pipe(**arguments())[0]

    def patch_now(running: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            elsewhere(lambda: vidaccel.patch(running, plan("window"), strict=True))
        return {}

    found = pipe(**arguments(), callback_on_step_end=patch_now)[0]
    session = vidaccel.session_of(pipe)
    assert session is not None and session.report().sparse_calls == session.report().calls == 8, "of 12"
    assert not torch.equal(found, dense) and not torch.equal(found, alone("window"))
    assert torch.equal(pipe(**arguments())[0], alone("window"))


def test_a_pass_that_began_unpatched_ends_unpatched() -> None:
    pipe = T2V.make()
    model = pipe.transformer
    given = (torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32))
    with torch.no_grad():
        dense = model(*given)[0]
        hook = model.blocks[0].register_forward_hook(
            lambda *_: elsewhere(lambda: vidaccel.patch(pipe, plan("window"))) and None
        )
        assert torch.equal(model(*given)[0], dense)
        hook.remove()
        session = vidaccel.session_of(pipe)
        assert session is not None and sum(session.report().fallbacks.values()) == 1, "the second of two layers"
        assert not torch.equal(model(*given)[0], dense)
        told: list[str] = []
        hook = model.blocks[0].register_forward_hook(lambda *_: told.append(elsewhere(lambda: refused(session.close))))
        model(*given)
        hook.remove()
        assert "WanTransformer3DModel is running, and this unpatch came in another thread" in told[0]
        session.close()
        assert torch.equal(model(*given)[0], dense)


@pytest.mark.parametrize("kept", [True, False], ids=["traceback kept", "traceback dropped"])
def test_a_run_that_failed_in_another_thread_is_over(kept: bool) -> None:
    """Its frames live as long as somebody keeps the error, and the thread goes on."""
    pipe, session = patched("window")
    errors: list[BaseException] = []

    def fail(*_: Any) -> dict[str, Any]:
        raise MemoryError("in decoding")

    def run() -> None:
        try:
            pipe(**arguments(), callback_on_step_end=fail)
        except MemoryError as error:
            errors.extend([error] * kept)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result(timeout=60)
        assert len(errors) == kept
        vidaccel.unpatch(pipe)
    assert session.closed


def test_patching_inside_a_forward_pass_of_a_bare_transformer_is_refused() -> None:
    model = T2V.make().transformer
    told: list[str] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: told.append(refused(lambda: vidaccel.patch(model, "dense"))))
    with torch.no_grad():
        model(torch.randn(1, 16, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 16, 32))
    assert told == [
        "WanTransformer3DModel is running, and this patch came in a callback of it; call vidaccel.patch(pipe) before or"
        " after the run"
    ]


def test_after_an_interrupted_run_nothing_is_in_the_way() -> None:
    pipe, _ = patched("window")

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**arguments(), callback_on_step_end=stop)
    vidaccel.unpatch(pipe)
    vidaccel.patch(pipe, plan("window"), strict=True)
    assert torch.equal(pipe(**arguments())[0], alone("window"))


def test_another_pipeline_may_be_patched_meanwhile() -> None:
    pipe, _ = patched("window")
    other = T2V.make()

    def end_of_step(*_: Any) -> dict[str, Any]:
        vidaccel.patch(other, plan("stateful"))
        vidaccel.unpatch(other)
        return {}

    assert torch.equal(pipe(**arguments(), callback_on_step_end=end_of_step)[0], alone("window"))


def test_a_pipeline_may_patch_itself_before_it_begins() -> None:
    from diffusers import WanPipeline

    class Mine(WanPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            vidaccel.patch(self, plan("window"), strict=True)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                vidaccel.unpatch(self)

    mine = Mine(**T2V.make().components)
    mine.set_progress_bar_config(disable=True)
    assert torch.equal(mine(**arguments())[0], alone("window"))
    assert vidaccel.session_of(mine) is None
