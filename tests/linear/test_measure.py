"""Errors of Linears while a generation runs, against quantising them by hand, and what calibration makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import vidaccel
from tests.calibration.test_calibrate import REQUESTS, calibrator, costs
from tests.linear.test_quantise import oracle
from tests.tiny_wan import tiny_wan
from vidaccel import LinearPlan, LinearRule
from vidaccel.calibration.calibrate import Calibrator, Effort
from vidaccel.calibration.linear_choice import linear_choices, linear_plan_of
from vidaccel.calibration.linear_stage import measure_linears, precisions_for, time_linears
from vidaccel.calibration.linear_table import LinearTable, cost_key
from vidaccel.calibration.observations import Observations
from vidaccel.calibration.plans import Choices
from vidaccel.calibration.sensitivity import latent_change
from vidaccel.calibration.summary import calibration_result
from vidaccel.cli.main import app
from vidaccel.errors import ConfigError, PlanFileError
from vidaccel.linear.measure import linear_error, plan_within, watch_linears
from vidaccel.linear.places import LinearPlace

CPU = torch.device("cpu")
EFFORT = Effort(bins=2, tiles=8, probes=2, everywhere=0)


def test_the_error_is_that_of_whole_numbers() -> None:
    linear = nn.Linear(48, 32).requires_grad_(False)
    x = torch.randn(7, 48)
    weight, out = linear.weight, linear(x)
    energy, errors = linear_error(linear, x, out, ("int8",))
    expected = (oracle(x, linear.weight, linear.bias) - out.double()).square().sum()
    assert energy == pytest.approx(float(out.double().square().sum()))
    assert errors["int8"] == pytest.approx(float(expected), rel=1e-2) and linear.weight is weight


def test_every_bin_call_and_token_counts() -> None:
    linear = nn.Linear(16, 8).requires_grad_(False)
    place = LinearPlace("blocks.*.ffn.net.2", 3, linear, "ffn")
    now: list[int | None] = [0]
    calls = [(0, torch.randn(2, 5, 16)), (1, 100 * torch.randn(2, 5, 16)), (None, torch.randn(4, 5, 16))]
    with watch_linears([("transformer", place, ("int8",))], 3, lambda: now[0], tokens=100) as found:
        for now[0], x in calls:
            linear(x)
    assert not linear._forward_hooks
    (one,) = found
    assert one.calls == 3 and one.rows == pytest.approx(40 / 3) and one.size == (8, 16) and one.layer == 3
    for bin, x in calls[:2]:
        assert bin is not None
        rows = x.reshape(-1, 16)
        energy, errors = linear_error(linear, rows, linear(rows), ("int8",))
        assert one.relative("int8", bin) == pytest.approx((errors["int8"] / energy) ** 0.5)
    assert one.relative("int8", 2) is None and one.relative("fp8", 0) is None
    assert one.worst("int8") == max(one.relative("int8", 0) or 0, one.relative("int8", 1) or 0)
    with watch_linears([("transformer", place, ("int8",))], 1, lambda: 0, tokens=3) as found:
        linear(calls[0][1])
    rows = calls[0][1].reshape(-1, 16)[[0, 3, 6]]  # evenly spread
    energy, errors = linear_error(linear, rows, linear(rows), ("int8",))
    assert found[0].relative("int8", 0) == pytest.approx((errors["int8"] / energy) ** 0.5)


def test_a_limit_holds_in_the_worst_bin() -> None:
    found = []
    for layer, errors in enumerate(([1e-4, 4e-4], [1e-4, 9e-4], [4e-4, 0.0])):
        with watch_linears(
            [("transformer", LinearPlace("b.*.ff.c", layer, nn.Linear(2, 2), "ff"), ())], 2, lambda: 0
        ) as one:
            pass
        one[0].energy, one[0].error = [1.0, 1.0], {"int8": errors}
        found += one
    assert plan_within(found, "int8", 0.025) == LinearPlan((LinearRule("int8", ("b.*.ff.c",), (0, 2), "transformer"),))
    with pytest.raises(ConfigError, match=r"within a relative error of 0\.01; the least is 0\.02, allow that"):
        plan_within(found, "int8", 0.01)


# -- in a calibration -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Calibrator:
    run = calibrator(tmp_path_factory.mktemp("state") / "o.safetensors", effort=EFFORT, linear=("int8",))
    run.observe()
    run.perturb()
    run.time_linears(cache=run.state.parent, budget_seconds=0.5)
    run.seen.times = {"total": 2.0, "attention": 16 * 0.01}
    return run


def with_seconds(done: Calibrator, ratio: Callable[[str], float]) -> Observations:
    """The same with made-up seconds: 1 ms a call natively."""
    seen = Observations.load(done.state)
    seen.times = dict(done.seen.times)
    assert seen.linears is not None
    seen.linears.seconds = {
        cost_key(item): {"native": 0.001, "int8": 0.001 * ratio(cost_key(item))} for item in seen.linears.items
    }
    return seen


def test_linears_are_watched_in_the_dense_runs(done: Calibrator) -> None:
    table = done.seen.linears
    assert table is not None and table.generations == len(REQUESTS) and len(table.items) == 20
    assert {item.kind for item in table.items} == {"attn1", "attn2", "ffn"}
    for item in table.items:
        assert item.calls == 2 * 2 * 4  # prompts, branches, steps
        assert all(0 < (item.relative("int8", bin) or 0) < 0.1 for bin in range(2)) and item.site == item.layer
    assert set(table.changes["int8"]) == {"attn1", "attn2", "ffn"} and min(table.changes["int8"].values()) > 0
    assert all(times["native"] > 0 < times["int8"] for times in table.seconds.values())
    assert not any(part._forward_hooks for part in done.pipe.transformer.modules() if isinstance(part, nn.Linear))


def test_the_file_and_times_are_kept(done: Calibrator) -> None:
    table = done.seen.linears
    again = Observations.load(done.state).linears
    assert table is not None and again is not None and again.to_dict() == table.to_dict()
    kept = time_linears(again, CPU, cache=done.state.parent, budget_seconds=0.0)
    assert kept == table.seconds  # not measured again


def test_predicted_errors_add_up_to_what_was_run(done: Calibrator) -> None:
    """All Linears of a kind together are predicted as they were measured, and single ones are of that size."""
    seen = with_seconds(done, lambda key: 0.5)
    choices = linear_choices(seen)
    assert seen.linears is not None
    reference = done.survey.generation.latents
    assert reference is not None
    for kind, change in seen.linears.changes["int8"].items():
        own = [choice for choice in choices if choice.item.kind == kind]
        assert sum(choice.error[1] for choice in own) == pytest.approx(change**2)
    some = [choice for choice in choices if choice.item.kind == "ffn" and choice.item.layer == 1]
    plan = linear_plan_of(some, [1] * len(some))
    assert plan == LinearPlan(
        (LinearRule("int8", ("blocks.*.ffn.net.0.proj", "blocks.*.ffn.net.2"), (1,), "transformer"),)
    )
    change = latent_change(done.pipe, vidaccel.Plan("some", linear=plan), REQUESTS[0], reference)
    predicted = sum(choice.error[1] for choice in some) ** 0.5
    assert predicted / 4 < change < 4 * predicted


def test_fast_linears_are_chosen_with_the_heads(done: Calibrator) -> None:
    seen = with_seconds(done, lambda key: 0.5 if "48 to" in key or "32 to 32" in key else 3.0)
    choices = Choices(seen, costs(seen), by="seconds")
    fast = [choice for choice in choices.linears if choice.seconds[1] < choice.seconds[0]]
    assert 0 < len(fast) <= 20
    solution = choices.at(float(choices.frontier.cost[0]))
    assert len(solution.choices) == len(choices.places) and len(solution.apart) == 20
    assert sum(solution.apart) == len(fast)  # the cheapest of all takes every one that is faster
    plan = choices.plan(solution, "plan", {})
    assert plan.linear is not None
    for choice, pick in zip(choices.linears, solution.apart, strict=True):
        item = choice.item
        assert plan.linear.lookup(item.transformer, item.module, item.layer) == ("int8" if pick else "native")
    with_, without = choices.predict(solution), Choices(seen, costs(seen), by="seconds", linear=False)
    alone = without.predict(without.at(float(without.frontier.cost[0])))
    saved = sum(choice.seconds[0] - choice.seconds[1] for choice in fast)
    assert with_.total == pytest.approx((alone.total or 0) - saved) and with_.error > alone.error
    best = choices.at(float(choices.frontier.cost[-1]))
    assert best.error == 0 and not any(best.apart) and choices.plan(best, "plan", {}).linear is None
    # between them the Lagrangian takes single ones: never more error than heads alone at the same time of day
    middle = choices.at(float(np.mean(choices.frontier.cost)))
    assert choices.squares(middle) == pytest.approx(middle.error)
    assert not Choices(seen, costs(seen), by="density").linears


def test_slow_linears_are_left_alone_and_told(done: Calibrator) -> None:
    seen = with_seconds(done, lambda key: 1.5)
    choices = Choices(seen, costs(seen), by="seconds")
    solution = choices.at(float(choices.frontier.cost[0]))
    assert not any(solution.apart)
    found = calibration_result(choices, solution)
    assert [row["chosen"] for row in found["linears"]] == [0, 0, 0]
    assert any("int8 Linears are slower than the model's own here (attn1 1.5 times" in note for note in found["notes"])


def test_an_older_file_gets_one_more_generation(done: Calibrator, tmp_path: Path) -> None:
    seen = Observations.load(done.state)
    seen.linears = None
    seen.save(tmp_path / "o.safetensors")
    run = calibrator(tmp_path / "o.safetensors", done.pipe, effort=EFFORT, linear=("int8",))
    run.observe()
    table = run.seen.linears
    assert table is not None and table.generations == 1 and len(run.linears.missing() if run.linears else []) == 3


def test_a_limit_without_a_calibration() -> None:
    pipe = tiny_wan()
    found = measure_linears(pipe, REQUESTS[:1], "int8", bins=4)
    worst = sorted(one.worst("int8") or 0 for one in found)
    assert len(found) == 20 and worst[0] > 0 and vidaccel.session_of(pipe) is None
    limit = worst[10]
    session = vidaccel.patch(pipe, "dense", linear=plan_within(found, "int8", limit))
    assert sum(len(row["layers"]) for row in session.report().linear) == 11
    for one in found:
        linear = pipe.transformer.get_submodule(one.module.replace("*", str(one.layer)))
        assert (type(linear.weight) is nn.Parameter) == ((one.worst("int8") or 0) > limit)


def test_what_may_be_asked_for() -> None:
    assert precisions_for("auto", CPU) == ("int8",) == precisions_for("int8", CPU)
    with pytest.raises(vidaccel.KernelError, match="this device is the CPU"):
        precisions_for("fp8", CPU)
    with pytest.raises(ConfigError, match="--linear is 'int4'; valid are int8, fp8, auto"):
        precisions_for("int4", CPU)


def test_damaged_tables_are_refused(done: Calibrator) -> None:
    assert done.seen.linears is not None
    good = json.dumps(done.seen.linears.to_dict())
    assert LinearTable.from_dict(json.loads(good), 2).to_dict() == json.loads(good)

    def refused(change: Callable[[dict[str, Any]], Any], bins: int = 2) -> None:
        data = json.loads(good)
        change(data)
        with pytest.raises(PlanFileError):
            LinearTable.from_dict(data, bins)

    refused(lambda data: None, bins=3)
    refused(lambda data: data.pop("changes"))
    refused(lambda data: data.update(more=1))
    refused(lambda data: data.update(precisions=["int4"]))
    refused(lambda data: data.update(precisions=[["int8"]]))
    refused(lambda data: data.update(generations=True))
    refused(lambda data: data["changes"].update(fp8={}))
    refused(lambda data: data["changes"]["int8"].update(ffn=-1.0))
    refused(lambda data: data["seconds"].update(all={"fp8": 1.0}))
    for name, values in {
        "module": (3, "blocks.0.ffn", "/etc/*.x"), "layer": (-1, 1.5, "a"), "transformer": ("vae", []),
        "size": ([1], [0, 3]), "dtype": ("int8", []), "energy": ([1.0], [float("nan"), 1.0], "ab"),
        "error": ({"fp8": [0, 0]}, [], {"int8": 3}),
        "calls": (-1, 1.0), "rows": (-1, "a"), "site": (1.5, -1), "bias": (1, None), "kind": (1,),
    }.items():  # fmt: skip
        for value in values:
            refused(lambda data, name=name, value=value: data["items"][0].update({name: value}))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From prompts to a plan that runs with the Linears it chose, as if int8 were twice as fast here."""
    from tests.cli.conftest import SMALL
    from tests.cli.test_calibrate import CANDIDATES

    def fast(table: LinearTable, device: torch.device, **_: Any) -> dict[str, dict[str, float]]:
        return {cost_key(item): {"native": 2e-3, "int8": 1e-3} for item in table.items}

    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: tmp_path / "costs")
    monkeypatch.setattr("vidaccel.calibration.linear_stage.time_linears", fast)
    tiny_wan(tmp_path / "model")
    (tmp_path / "few.yaml").write_text(CANDIDATES)
    out, page, figures = tmp_path / "plan.safetensors", tmp_path / "page.html", tmp_path / "figures.json"
    arguments = [
        "calibrate", f"--model={tmp_path / 'model'}", f"--candidates={tmp_path / 'few.yaml'}", "--prompt=a red ball",
        f"--output={out}", *SMALL, "--bins=1", "--tiles=4", "--probes=1", "--whole-probes=0", "--validate=1",
        "--linear=int8",
    ]  # fmt: skip
    for more, told in {
        "--density=0.5": "--density does not count Linears",
        "--caches=first-block:0.08": "--linear and --caches are not chosen together",
        "--target-gpu=H200": "--target-gpu predicts attention alone",
    }.items():
        refused = CliRunner().invoke(app, [*arguments, more, *([] if "density" in more else ["--max-error=1"])])
        assert refused.exit_code == 2 and told in refused.output
    made = CliRunner().invoke(app, [*arguments, "--max-error=100", f"--html={page}", f"--json={figures}"])
    assert made.exit_code == 0, made.output
    assert "Linears of the blocks in 8 bits" in made.output and "Linears of the blocks in 8 bits" in page.read_text()
    found = json.loads(figures.read_text())
    rows = found["calibration"]["linears"]
    assert [(row["kind"], row["count"], row["chosen"]) for row in rows] == [
        ("attn1", 8, 8), ("attn2", 8, 8), ("ffn", 4, 4)
    ]  # fmt: skip
    plan = vidaccel.load_plan(out)
    assert plan.linear is not None and plan.linear.lookup("transformer", "blocks.*.ffn.net.2", 1) == "int8"
    assert found["calibration"]["measured"]["error"] > 0  # of a run with them
    observations = out.with_suffix(".observations.safetensors")
    again = tmp_path / "again.safetensors"
    solved = CliRunner().invoke(app, ["solve", str(observations), "--max-error=100", f"--output={again}"])
    assert solved.exit_code == 0 and vidaccel.load_plan(again).linear == plan.linear
