"""A copy of a patched pipeline is patched on its own or not at all, and what cannot be copied or pickled says so."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import vidaccel
from tests.reliability.plans import REMEMBERS, SPARSE, alone, dense, patched
from tests.zoo import cogvideox, hunyuan_video, wan
from tests.zoo.case import Case
from vidaccel import PatchError, Plan, StrictError, VidaccelWarning

T2V, DUAL = wan.CASES[0], next(case for case in wan.CASES if case.pipeline == "WanPipeline-2.2-dual")


@pytest.mark.full
@pytest.mark.parametrize("when", ["before a run", "after a run"])
@pytest.mark.parametrize("plan", [SPARSE, REMEMBERS], ids=lambda plan: plan.name)
@pytest.mark.parametrize("case", [T2V, DUAL, cogvideox.CASES[0], hunyuan_video.CASES[0]], ids=str)
def test_a_deep_copy_of_a_pipeline_is_patched_on_its_own(case: Case, plan: Plan, when: str) -> None:
    pipe, session = patched(case, plan, strict=True)
    if when == "after a run":
        case.run(pipe)
        session.reset_stats()
    made = copy.deepcopy(pipe)
    own = vidaccel.session_of(made)
    assert own is not None and own is not session and own.plan == plan and own.strict
    assert torch.equal(case.run(made), alone(case, plan))
    assert own.report().sparse_calls == own.report().calls > 0 and session.report().calls == 0
    vidaccel.unpatch(made)
    assert own.closed and not session.closed and vidaccel.session_of(made) is None
    assert torch.equal(case.run(made), dense(case)), "the copy is what it would be without a patch"
    assert torch.equal(case.run(pipe), alone(case, plan)), "the original goes on as it was"
    vidaccel.patch(made, plan, strict=True)
    vidaccel.unpatch(pipe)
    assert torch.equal(case.run(pipe), dense(case))
    assert torch.equal(case.run(made), alone(case, plan))


def attached(model: Any) -> list[str]:
    """Everything of ours that hangs on a model."""
    found = [name for name in model.__dict__ if "vidaccel" in name or name == "__deepcopy__"]
    found += [name for name, _ in model.named_buffers() if "vidaccel" in name]
    for module in model.modules():
        found += [str(hook) for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()]
        found += [type(module.processor).__name__] if "Sparse" in type(getattr(module, "processor", 0)).__name__ else []
    return found


@pytest.mark.parametrize("what", ["transformer", "transformer_2"])
def test_a_copy_of_one_transformer_takes_nothing_else_along(what: str) -> None:
    pipe, session = patched(DUAL)
    model = getattr(pipe, what)
    made = copy.deepcopy(model)
    own = vidaccel.session_of(made)
    assert own is not None and own is not session
    assert {site.transformer.name for site in own.sites} == {what} and len(own.sites) == len(session.sites) // 2
    setattr(pipe, what, made)
    assert torch.equal(DUAL.run(pipe), alone(DUAL))
    assert own.report().calls > 0
    own.close()
    assert not attached(made) and attached(model)
    vidaccel.unpatch(pipe)
    assert session.closed and not attached(model)


def test_an_average_of_weights_is_made_of_a_copy() -> None:
    pipe, session = patched(T2V)
    average = AveragedModel(pipe.transformer)
    average.update_parameters(pipe.transformer)
    made = average.module
    own = vidaccel.session_of(made)
    assert own is not None and own is not session
    pipe.transformer = made
    assert torch.equal(T2V.run(pipe), alone(T2V)) and own.report().calls > 0 == session.report().calls


@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn1", "rope", "patch_embedding", "norm_out"])
def test_a_part_that_is_copied_alone_is_not_patched(part: str) -> None:
    pipe, _ = patched(T2V)
    made = copy.deepcopy(pipe.transformer.get_submodule(part))
    plain = T2V.make().transformer
    parent, _, name = part.rpartition(".")
    setattr(plain.get_submodule(parent), name, made)
    other = T2V.make()
    other.transformer = plain
    assert torch.equal(T2V.run(other), dense(T2V))


def test_a_shallow_copy_shares_the_session() -> None:
    pipe, session = patched(T2V, strict=True)
    shared = copy.copy(pipe)
    assert vidaccel.session_of(shared) is session
    assert torch.equal(T2V.run(shared), alone(T2V))
    vidaccel.unpatch(shared)
    assert session.closed and torch.equal(T2V.run(pipe), dense(T2V)) and torch.equal(T2V.run(shared), dense(T2V))
    vidaccel.patch(pipe, SPARSE)
    model = copy.copy(pipe.transformer)
    vidaccel.unpatch(pipe)
    pipe.transformer = model
    assert torch.equal(T2V.run(pipe), dense(T2V))
    session = vidaccel.patch(pipe, SPARSE)
    assert torch.equal(T2V.run(pipe), alone(T2V))


def test_from_pipe_shares_the_session() -> None:
    import diffusers

    pipe, session = patched(T2V, strict=True)
    other = diffusers.WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert vidaccel.session_of(other) is session
    call = next(case for case in wan.CASES if case.pipeline == "WanVideoToVideoPipeline").call()
    other(**call)
    assert session.report().sparse_calls == session.report().calls > 0
    vidaccel.unpatch(other)
    assert torch.equal(T2V.run(pipe), dense(T2V))


def trained_gates(value: float) -> dict[str, torch.Tensor]:
    return {
        f"blocks.{layer}.to_gate_compress.{name}": torch.full(shape, value)
        for layer in range(2)
        for name, shape in (("weight", (48, 48)), ("bias", (48,)))
    }


def test_trained_parts_go_along() -> None:
    plan = Plan.uniform("gates", vidaccel.HeadPolicy(SPARSE.rules[0].policy.heads[0].pattern, compensation="coarse"))
    pipe = T2V.make()
    vidaccel.patch(pipe, plan, weights=trained_gates(0.01))
    expected = T2V.run(pipe)
    made = copy.deepcopy(pipe)
    assert torch.equal(T2V.run(made), expected)
    vidaccel.unpatch(pipe)
    assert torch.equal(T2V.run(made), expected)
    vidaccel.unpatch(made)
    assert torch.equal(T2V.run(made), dense(T2V)) and not attached(made.transformer)


PICKLES: dict[str, Callable[[Any], object]] = {
    "pipeline": pickle.dumps,
    "transformer": lambda pipe: pickle.dumps(pipe.transformer),
    "torch.save": lambda pipe: torch.save(pipe.transformer, io.BytesIO()),
    "block": lambda pipe: pickle.dumps(pipe.transformer.blocks[0]),
    "rope": lambda pipe: pickle.dumps(pipe.transformer.rope),
    "spawn": lambda pipe: ForkingPickler.dumps(pipe.transformer),
}


@pytest.mark.parametrize("how", PICKLES)
def test_pickling_is_refused_in_words(how: str) -> None:
    pipe, _ = patched(T2V)
    with pytest.raises(PatchError, match=r"cannot be pickled .* call vidaccel\.unpatch\(pipe\) first"):
        PICKLES[how](pipe)
    vidaccel.unpatch(pipe)
    pickle.dumps(pipe.transformer)


def test_state_dicts_and_saved_folders_hold_nothing_of_ours(tmp_path: Any) -> None:
    pipe, _ = patched(T2V)
    assert list(pipe.transformer.state_dict()) == list(T2V.make().transformer.state_dict())
    pipe.save_pretrained(tmp_path)
    assert torch.equal(T2V.run(type(pipe).from_pretrained(tmp_path)), dense(T2V))


def test_hooks_of_diffusers_keep_a_copy_from_being_right_and_it_says_so() -> None:
    """Such hooks hold on to the module they were made for, so a copy's blocks would run the original's."""
    pipe, session = patched(T2V, Plan("cached", SPARSE.rules, tile=SPARSE.tile, cache="first-block:0.1"))
    with pytest.raises(PatchError, match="transformer cannot be copied as it is, because it has hooks of diffusers"):
        copy.deepcopy(pipe)
    assert not session.closed
    vidaccel.unpatch(pipe)
    assert torch.equal(T2V.run(copy.deepcopy(pipe)), dense(T2V))


def test_a_dropped_copy_is_freed_and_leaves_the_original_alone() -> None:
    pipe, session = patched(T2V)
    gone = weakref.ref(copy.deepcopy(pipe).transformer)
    gc.collect()
    assert gone() is None and not session.closed
    assert torch.equal(T2V.run(pipe), alone(T2V))


def test_a_strict_copy_notices_a_swap_of_its_own() -> None:
    pipe, _ = patched(T2V, strict=True)
    made = copy.deepcopy(pipe)
    made.transformer = T2V.make().transformer
    with pytest.raises(StrictError, match="transformer of WanPipeline: it was replaced after patching"):
        T2V.run(made)
    assert torch.equal(T2V.run(pipe), alone(T2V))


def test_a_model_that_stays_dense_is_copied_with_its_reason() -> None:
    from tests.patchers.test_dense_only import run, sana

    pipe = sana()
    expected = run(pipe)
    with pytest.warns(VidaccelWarning, match="stays dense"):
        session = vidaccel.patch(pipe, SPARSE)
    made = copy.deepcopy(pipe)
    own = vidaccel.session_of(made)
    assert own is not None and own is not session and torch.equal(run(made), expected)
    vidaccel.unpatch(made)
    assert vidaccel.session_of(made) is None and vidaccel.session_of(pipe) is session
