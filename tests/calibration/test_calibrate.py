"""Calibration of a tiny real pipeline from end to end: what is predicted is what happens, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vidaccel
from tests.tiny_wan import tiny_wan
from vidaccel.calibration.calibrate import Calibrator, Effort, _spread
from vidaccel.calibration.candidates import CandidateSet
from vidaccel.calibration.closed_loop import check_heads, for_quality, rank_correlation
from vidaccel.calibration.cost import Costs
from vidaccel.calibration.drift import measure_drift
from vidaccel.calibration.observations import Observations
from vidaccel.calibration.observe import noise_edges
from vidaccel.calibration.plans import Choices
from vidaccel.calibration.predicted import costs_on
from vidaccel.calibration.sensitivity import choose_probes, latent_change
from vidaccel.calibration.shape import Shape
from vidaccel.calibration.solve import Solution
from vidaccel.calibration.summary import calibration_result, provenance
from vidaccel.calibration.transfer import points_of, summed_squares
from vidaccel.configs.artifact import load_plan, save_plan
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy
from vidaccel.errors import ConfigError
from vidaccel.pipelines.generate import Request, generate
from vidaccel.types import TileShape

pytestmark = pytest.mark.full

SMALL = {"height": 48, "width": 64, "num_frames": 17, "num_inference_steps": 4, "max_sequence_length": 16}
REQUESTS = [Request(text, seed, SMALL) for seed, text in enumerate(("a red ball", "a blue cat"))]
SPECS = (
    PatternSpec.make("sliding_tile", window=[1, 1, 1]),
    PatternSpec.make("sliding_tile", window=[1.0, 1, 1]),
    PatternSpec.make("sliding_tile", window=[1, 1.0, 1.0]),
    PatternSpec.make("pooled_top_k", density=0.4),
)
CANDIDATES = CandidateSet(
    "test",
    "for tests",
    TileShape(2, 2, 2),
    (HeadPolicy(), *(HeadPolicy(spec, compensation=c) for spec in SPECS for c in ("none", "pooled_tail"))),
)
EFFORT = Effort(bins=2, steps=2, tiles=100, probes=4, everywhere=3)
SHORTER = replace(EFFORT, everywhere=0)


def calibrator(state: Path, pipe: Any = None, **options: Any) -> Calibrator:
    return Calibrator(pipe or tiny_wan(), REQUESTS, CANDIDATES, state, **{"effort": EFFORT, **options})


def costs(seen: Observations, dense: float = 0.01) -> Costs:
    """Made-up seconds: a constant and a share that goes with the density."""
    kept = {p: np.mean([cell.density[i] for cell in seen.cells.values()]) for i, p in enumerate(seen.candidates)}
    table = {policy: dense * (0.1 + 0.8 * float(density)) for policy, density in kept.items() if not policy.is_dense}
    return Costs("test", "measured", dense, table)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Calibrator:
    run = calibrator(tmp_path_factory.mktemp("state") / "o.safetensors")
    run.observe()
    run.perturb()
    run.seen.times = {"total": 2.0, "attention": 16 * 0.01}
    return run


def test_everything_was_seen(done: Calibrator) -> None:
    seen = done.seen
    assert seen.places() == [(b, "transformer", layer) for b in (0, 1) for layer in (0, 1)]
    assert seen.steps == (2, 2) and sum(len(seen.at(*place)) for place in seen.places()) == 8
    assert all(cell.prompts == 2 for cell in seen.cells.values())
    assert all(weight > 0 for weight in seen.weight.values()) and len(seen.probes) == 4 + 3
    for cell in seen.cells.values():
        assert cell.error[0].max() <= 1e-6 * cell.energy.min()  # dense is exact
        np.testing.assert_allclose(cell.cosine[0], 1, atol=1e-5)
        np.testing.assert_allclose(cell.mass[0], 1, atol=1e-5)
        assert (cell.error[1:] > 0).all() and (cell.density[1:] < 1).all()


def test_everything_is_perturbed_on_several_prompts(done: Calibrator) -> None:
    keys = [request.fingerprint for request in REQUESTS]
    wholes = [probe for probe in done.seen.probes if "everywhere" in probe]
    assert [(probe["key"].split("/")[1], probe["prompt"]) for probe in wholes] == [
        ("0.35", keys[1]), ("0.35", keys[0]), ("0.7", keys[1])
    ]  # fmt: skip
    points = points_of(done.seen)
    choices = Choices(done.seen, None)
    assert choices.transfer.prompts == 2 and points[2].squares > 0 < points[0].squares
    # the fit goes through the middle of what it was fitted to
    for point in points:
        assert 0.5 < choices.transfer.error(point.squares) / point.change < 2
    # and its sum of squares is that of the solver
    number = done.seen.candidates.index(HeadPolicy(SPECS[0]))
    alike = Solution(tuple(np.full(2, number) for _ in choices.places), 0.0, 0.0)
    same = summed_squares(done.seen, [(place, number) for place in choices.places])
    assert choices.squares(alike) == pytest.approx(same)


def test_prediction_and_run_agree(done: Calibrator) -> None:
    """Densities exactly, where the blocks are fixed; the latent error within the approximation of added squares."""
    choices = Choices(done.seen, None)
    for budget in (0.4, 0.7):
        solution = choices.at(budget)
        predicted = choices.predict(solution)
        assert predicted.density <= budget and predicted.total is None
        plan = choices.plan(solution, "plan", {})
        session = vidaccel.patch(done.pipe, plan, strict=True)
        found = generate(done.pipe, REQUESTS[0])
        report = session.report()
        vidaccel.unpatch(done.pipe)
        assert report.density == pytest.approx(predicted.density, abs=0.03)
        reference = done.survey.generation.latents
        assert found.latents is not None and reference is not None
        change = float((found.latents - reference).norm() / reference.norm())
        assert 0.3 * predicted.error < change < 3 * predicted.error


def test_what_is_known_so_far(done: Calibrator) -> None:
    rows = done.standing()
    assert [prompts for _, prompts, _ in rows] == [2, 2]
    for _, _, errors in rows:
        assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < 1  # more blocks, no more error


def test_all_dense_is_exact(done: Calibrator) -> None:
    choices = Choices(done.seen, None)
    solution = choices.at(1.0)
    assert choices.predict(solution).error == 0 and choices.plan(solution, "plan", {}).is_dense
    reference = done.survey.generation.latents
    assert reference is not None
    assert latent_change(done.pipe, choices.plan(solution, "plan", {}), REQUESTS[0], reference) == 0


def test_budgets(done: Calibrator) -> None:
    seen = done.seen
    choices = Choices(seen, costs(seen), by="seconds")
    errors = []
    for speedup in (1.0, 1.01, 1.03, 1.05):
        predicted = choices.predict(choices.for_speedup(speedup))
        assert predicted.total is not None and predicted.total <= 2.0 / speedup * (1 + 1e-6)
        errors.append(predicted.error)
    assert errors == sorted(errors) and errors[0] == 0
    bound = errors[2]
    assert choices.predict(choices.for_error(bound)).error <= bound * (1 + 1e-6)
    with pytest.raises(ConfigError, match="no plan takes 0.02 s: the fastest takes"):
        choices.for_speedup(100.0)
    assert choices.dense_seconds == 2.0 and choices.other_seconds == pytest.approx(2.0 - 0.16)


def test_a_quality_that_is_measured(done: Calibrator) -> None:
    choices = Choices(done.seen, None)
    tried = []

    def measure(solution: Any) -> float:
        tried.append(choices.predict(solution).error)
        return -tried[-1]

    limit = choices.predict(choices.at(0.6)).error
    found = choices.predict(for_quality(choices, measure, -limit))
    assert found.error <= limit and len(tried) <= 6
    with pytest.raises(ConfigError, match="no choice that was tried reaches 1"):
        for_quality(choices, measure, 1.0)
    tried.clear()
    with pytest.raises(ConfigError, match="there was no time to try any"):
        for_quality(choices, measure, -limit, go_on=lambda: False)
    assert not tried


def test_heads_are_checked_one_by_one(done: Calibrator) -> None:
    choices = Choices(done.seen, None)
    reference = done.survey.generation.latents
    assert reference is not None
    found = list(check_heads(done.pipe, choices, choices.at(0.4), REQUESTS[0], reference))
    assert {(head.layer, head.head) for head in found} <= {(layer, head) for layer in (0, 1) for head in (0, 1)}
    assert found and all(head.measured > 0 and head.predicted > 0 for head in found)
    assert len(list(check_heads(done.pipe, choices, choices.at(0.4), REQUESTS[0], reference, most=2))) == 2


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 3, 3, 9]) == pytest.approx(1)  # ties share a rank
    assert np.isnan(rank_correlation([1, 2], [1, 2])) and np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_both_transformers_have_their_own_steps(tmp_path: Path) -> None:
    run = calibrator(tmp_path / "o.safetensors", tiny_wan(dual=True), effort=SHORTER)
    run.observe()
    run.perturb()
    owners = {(bin, transformer) for bin, transformer, _ in run.seen.places()}
    assert {transformer for _, transformer in owners} == {"transformer", "transformer_2"}
    assert len(owners) == run.seen.bins and sum(run.seen.steps) == 4  # no bin is shared
    choices = Choices(run.seen, None)
    plan = choices.plan(choices.at(0.5), "plan", {})
    session = vidaccel.patch(run.pipe, plan, strict=True)
    generate(run.pipe, REQUESTS[0])
    assert session.report().density == pytest.approx(choices.predict(choices.at(0.5)).density, abs=0.03)


def test_other_weights_are_another_run(done: Calibrator) -> None:
    other = tiny_wan()
    with torch.no_grad():
        other.transformer.blocks[0].attn1.to_q.weight.mul_(1.3)
    with pytest.raises(ConfigError, match="a run with other weights;"):
        calibrator(done.state, other)


def test_pictures_have_fingerprints_of_their_content() -> None:
    from PIL import Image

    keys = {
        Request("a", 0, {"image": Image.new("RGB", (4, 4), colour)}).fingerprint for colour in ("red", "red", "blue")
    }
    assert len(keys) == 2


def test_steps_rotate_through_a_bin() -> None:
    for size in range(1, 11):
        for count in (1, 2, 3):
            met = {step for prompt in range(size) for step in _spread([range(size)], count, prompt)}
            assert met == set(range(size))


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("stage", "number"), [("observe", 1), ("perturb", 2)])
def test_a_killed_run_goes_on_and_ends_the_same(done: Calibrator, tmp_path: Path, stage: str, number: int) -> None:
    def tell(now: str, count: int, total: int) -> None:
        if (now, count) == (stage, number):
            raise Killed

    state = tmp_path / "o.safetensors"
    run = calibrator(state, tell=tell, effort=SHORTER)
    with pytest.raises(Killed):
        run.observe()
        run.perturb()
    with pytest.raises(vidaccel.NotPatchedError):
        vidaccel.unpatch(run.pipe)
    stored = Observations.load(state)
    assert len(stored.done) == (1 if stage == "observe" else 2)
    assert len(stored.probes) == (0 if stage == "observe" else 2)
    again = calibrator(state, effort=SHORTER)
    again.observe()
    again.perturb()
    assert again.seen.done == done.seen.done
    for place, cell in done.seen.cells.items():
        np.testing.assert_allclose(again.seen.cells[place].error, cell.error, rtol=1e-5)
    assert again.seen.weight == pytest.approx(done.seen.weight, rel=1e-4)


def test_a_state_of_other_settings_is_refused_and_kept(done: Calibrator) -> None:
    before = done.state.read_bytes()
    other = [replace(REQUESTS[0], arguments={**SMALL, "num_inference_steps": 3})]
    with pytest.raises(ConfigError, match="observations of a run with other generation settings;"):
        Calibrator(done.pipe, other, CANDIDATES, done.state, effort=EFFORT)
    assert done.state.read_bytes() == before


def test_other_settings_are_refused_before_anything_runs(done: Calibrator, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: Any) -> None:
        raise AssertionError("a generation was begun")

    monkeypatch.setattr("vidaccel.calibration.calibrate.take_survey", ran)
    fewer = replace(CANDIDATES, policies=CANDIDATES.policies[:-1])
    for changed, what in (
        ({"requests": [replace(REQUESTS[0], arguments={**SMALL, "negative_prompt": "b"})]}, "generation settings"),
        ({"candidates": fewer}, "candidates"),
        ({"effort": replace(EFFORT, bins=3)}, "noise bins"),
    ):
        given = {"requests": REQUESTS, "candidates": CANDIDATES, "effort": EFFORT, **changed}
        with pytest.raises(ConfigError, match=f"a run with other {what};"):
            Calibrator(done.pipe, given["requests"], given["candidates"], done.state, effort=given["effort"])


def test_no_prompt_is_stored(tmp_path: Path) -> None:
    secret = [replace(REQUESTS[0], prompt="secret", arguments={**SMALL, "negative_prompt": "secret"})]
    run = Calibrator(tiny_wan(), secret, CANDIDATES, tmp_path / "o.safetensors", effort=EFFORT)
    run.observe()
    assert b"secret" not in run.state.read_bytes() and b"sha256:" in run.state.read_bytes()


def test_layers_in_other_units_are_probed_apart(done: Calibrator) -> None:
    seen = done.seen
    together = choose_probes(seen, 2)
    assert [probe.layers for probe in together] == [(0, 1), (0, 1)]
    apart = choose_probes(seen, 2, apart={("transformer", 1)})
    assert sorted(probe.layers for probe in apart) == [(0,), (0,), (1,), (1,)]


def test_times_of_a_gpu_that_is_not_here(done: Calibrator, tmp_path: Path) -> None:
    assert done.seen.shape == Shape(1, 2, 16, "float32")  # guidance branches are batches of their own
    done.seen.save(tmp_path / "o.safetensors")
    seen = Observations.load(tmp_path / "o.safetensors")
    assert seen.shape == done.seen.shape
    seen.shape = Shape(1, 12, 128, "float32")
    found = costs_on("H200", seen)
    assert found.origin == "predicted" and found.device.startswith("H200")
    choices = Choices(seen, found, by="seconds")
    calls = 2 * 2 * 4  # layers, branches, steps
    assert choices.dense_seconds == pytest.approx(calls * found.dense) and choices.other_seconds == 0
    solution = choices.at(choices.frontier.cost[0] * 1.5)
    predicted = choices.predict(solution)
    assert predicted.total == predicted.attention and predicted.total is not None
    told = calibration_result(choices, solution)
    assert told["costs"]["origin"] == "predicted" and "self-attention, predicted for H200" in told["costs"]["seconds"]
    assert any("no seconds were measured" in note for note in told["notes"])
    # what that GPU cannot run is never chosen
    lacking = seen.candidates[1]
    table = {policy: seconds for policy, seconds in found.table.items() if policy != lacking}
    for budget in np.linspace(0.05, 1, 7):
        chosen = Choices(seen, replace(found, table=table), by="density")
        if chosen.frontier.cost[0] <= budget:
            assert all((choice != 1).all() for choice in chosen.at(float(budget)).choices)
    seen.shape = None
    with pytest.raises(ConfigError, match="do not tell the shape of an attention call"):
        costs_on("H200", seen)


def test_no_time_means_one_prompt_and_a_note(tmp_path: Path) -> None:
    run = calibrator(tmp_path / "o.safetensors", effort=replace(EFFORT, max_minutes=1e-6))
    run.observe()
    assert len(run.seen.done) == 1 and any("the time was up after 1 of 2 prompts" in note for note in run.advice())
    assert any("one prompt tells nothing" in note for note in run.advice())


def test_the_plan_file_tells_where_it_comes_from(done: Calibrator, tmp_path: Path) -> None:
    choices = Choices(done.seen, costs(done.seen))
    solution = choices.at(0.5)
    plan = choices.plan(solution, "plan", provenance(choices, solution, "--density 0.5", "vidaccel calibrate"))
    save_plan(plan, tmp_path / "plan.safetensors")
    found = load_plan(tmp_path / "plan.safetensors")
    assert found == plan and found.fingerprint is not None and str(found.fingerprint.grid) == "5x3x4"
    told = dict(found.provenance)
    assert told["budget"] == "--density 0.5" and told["costs"] == "measured on test" and "predicted_seconds" in told


def test_plain_values_for_the_page(done: Calibrator) -> None:
    import json

    choices = Choices(done.seen, costs(done.seen))
    found = calibration_result(choices, choices.at(0.5), notes=["a note"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    errors = [point["error"] for point in found["front"]]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    assert len(found["heatmaps"]["density"]) == 2 and np.array(found["heatmaps"]["error"][0]["values"]).shape == (2, 2)
    assert found["mass"][0]["candidates"] == [str(spec) for spec in SPECS]


def test_drift(done: Calibrator) -> None:
    choices = Choices(done.seen, None)
    plan = choices.plan(choices.at(0.5), "plan", {})
    same = measure_drift(done.pipe, plan, REQUESTS, done.seen, effort=replace(EFFORT, steps=2))
    assert same.then is not None and same.now == pytest.approx(same.then, rel=0.05) and not same.drifted
    assert same.rank_correlation is not None and 0.9 < same.rank_correlation <= 1
    # other weights are another model: what was local need not be so any more
    other = tiny_wan(seed=5)
    with torch.no_grad():
        for block in other.transformer.blocks:
            block.attn1.norm_q.weight.mul_(6.0)
    changed = measure_drift(other, replace(plan, fingerprint=None), REQUESTS[:1], done.seen)
    assert changed.drifted and changed.drifted[0].now > 1.5 * (changed.drifted[0].then or 0)
    with pytest.raises(ConfigError, match="dense everywhere"):
        measure_drift(done.pipe, vidaccel.Plan.dense(), REQUESTS, None)


def test_noise_edges() -> None:
    levels = dict(enumerate([1.0, 0.8, 0.6, 0.2]))
    one = dict.fromkeys(levels, "transformer")
    assert noise_edges(levels, one, 2) == (0.0, 0.7, 1.0)
    assert noise_edges({0: 1.0}, {0: "transformer"}, 5) == (0.0, 1.0)
    assert len(noise_edges({i: i / 20 for i in range(1, 21)}, {}, 5)) == 6
    # the second transformer takes over within a bin, which ends there
    assert noise_edges(levels, {**one, 3: "transformer_2"}, 1) == (0.0, 0.4, 1.0)
