"""Where 8-bit Linears run and which Linears they are: every refusal is a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import nn
from typer.testing import CliRunner

import vidaccel
from tests.configs.strategies import linear_plans
from tests.zoo import cogvideox, hunyuan_video, mochi, wan
from vidaccel import LinearPlan, LinearRule
from vidaccel.cli.main import app
from vidaccel.configs.linear import linear_from_data, linear_to_data
from vidaccel.linear.places import linear_places, stacks_of
from vidaccel.linear.support import config_of, why_no_torchao, why_not, why_not_linear, why_not_table
from vidaccel.pipelines.patch import find_transformers

CUDA = torch.device("cuda")


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return pretend


def test_devices(capability: Callable[[int, int], None]) -> None:
    assert why_not("int8", "cpu") is None
    told = why_not("fp8", "cpu")
    assert told == "fp8 Linears need a CUDA device of compute capability 8.9 or later, and this device is the CPU"
    assert "or a CPU, and this device is mps" in str(why_not("int8", "mps"))
    capability(8, 6)
    assert why_not("int8", "cuda") is None and "and this one has 8.6" in str(why_not("fp8", "cuda"))
    capability(9, 0)
    assert why_not_table("cuda") == {"int8": None, "fp8": None}
    capability(7, 0)
    assert "7.5 or later, and this one has 7.0" in str(why_not("int8", "cuda"))


def test_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none" in str(why_not("int8", "cuda"))


@pytest.mark.parametrize(
    ("found", "told"), [(None, "is not installed; pip install"), ("0.9.0", "0.9.0 is older than 0.13")]
)
def test_torchao_missing_or_old(found: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    pipe = wan.CASES[0].make()
    monkeypatch.setattr(metadata, "version", version)
    assert told in str(why_no_torchao()) and told in str(why_not("int8", "cpu"))
    with pytest.raises(vidaccel.ConfigError, match=f"linear=int8 needs torchao: torchao {told}"):
        vidaccel.patch(pipe, "dense", linear="int8")
    with pytest.raises(vidaccel.ConfigError, match=r"vidaccel\[linear\]"):
        config_of("int8")
    assert vidaccel.session_of(pipe) is None


def test_a_device_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan.CASES[0].make()
    with pytest.raises(vidaccel.KernelError, match="8.9 or later, and this device is the CPU; leave linear=fp8 out"):
        vidaccel.patch(pipe, "dense", linear="fp8")
    assert vidaccel.session_of(pipe) is None


def test_weights_that_cannot() -> None:
    cpu = torch.device("cpu")
    assert why_not_linear(nn.Linear(33, 7), "int8", cpu) is None
    assert (
        why_not_linear(nn.Linear(33, 7), "int8", CUDA)
        == "int8 takes sizes that are multiples of 8, and its weight is 7x33"
    )
    half = nn.Linear(24, 32, dtype=torch.bfloat16)
    assert why_not_linear(half, "int8", CUDA) is None
    assert why_not_linear(half, "fp8", CUDA) == "fp8 takes sizes that are multiples of 16, and its weight is 32x24"
    assert why_not_linear(nn.Linear(32, 32), "fp8", CUDA) == "fp8 takes weights in bfloat16, and its weight is float32"

    class Own(nn.Linear):
        pass

    assert why_not_linear(Own(8, 8), "int8", cpu) == "it is a Own, not a plain nn.Linear"


CHOSEN = {
    "wan": (wan.CASES[0], 10, set()),
    "vace": (next(c for c in wan.CASES if c.pipeline == "WanVACEPipeline"), 20, {"proj_in", "proj_out"}),
    "cogvideox": (cogvideox.CASES[0], 6, {"norm1.linear", "norm2.linear"}),
    "hunyuan": (hunyuan_video.CASES[0], 17, {"norm.linear", "norm1.linear", "norm1_context.linear"}),
    "mochi": (mochi.CASES[0], 12, {"norm1.linear", "norm1_context.linear", "norm1_context.linear_1"}),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_which_linears(name: str) -> None:
    case, count, kept = CHOSEN[name]
    _, model, family = find_transformers(case.make())[0]
    places = linear_places(model, stacks_of(family.layers))
    assert len({place.module for place in places if place.kept is None}) == count
    assert {place.module.split(".*.")[1] for place in places if place.kept is not None} == kept
    inside = {id(place.linear) for place in places}
    outside = [path for path, part in model.named_modules() if isinstance(part, nn.Linear) and id(part) not in inside]
    assert not any("attn" in path and "refiner" not in path for path in outside)
    for place in places:
        assert model.get_submodule(place.module.replace("*", str(place.layer))) is place.linear


# -- plans -----------------------------------------------------------------------------------------------------------


@given(linear_plans)
def test_plans_as_plain_data(plan: LinearPlan) -> None:
    assert linear_from_data(linear_to_data(plan)) == plan
    assert linear_from_data(json.loads(json.dumps(linear_to_data(plan)))) == plan


BAD = {
    "int4": "linear is 'int4'; valid are int8, fp8, none",
    "number": (3, "linear is 3; give the name of a precision, or a list of rules"),
    "empty": ([], "LinearPlan has 0 rules"),
    "unknown key": ([{"precision": "int8", "noise": [0, 1]}], "rule 1 of linear is .*give a mapping with precision"),
    "no precision": ([{"layers": [1]}], "rule 1 of linear"),
    "precision": ([{"precision": ["int8"]}], r"LinearRule.precision is \['int8'\]; valid are native"),
    "no star": (
        [{"precision": "int8", "modules": ["blocks.0.attn1"]}],
        "holds 'blocks.0.attn1'; give a path with a star",
    ),
    "path": ([{"precision": "int8", "modules": ["../*.x"]}], "give a path with a star"),
    "text": ([{"precision": "int8", "modules": "blocks.*.x"}], "LinearRule.modules is 'blocks"),
    "layer": ([{"precision": "int8", "layers": [-1]}], "LinearRule.layers holds -1"),
    "true": ([{"precision": "int8", "layers": [True]}], "LinearRule.layers holds True"),
    "no layers": ([{"precision": "int8", "layers": []}], "LinearRule.layers is "),
    "transformer": ([{"precision": "int8", "transformer": "vae"}], "LinearRule.transformer is 'vae'; valid are transf"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_plan(name: str) -> None:
    data, told = BAD[name] if isinstance(BAD[name], tuple) else (name, BAD[name])
    with pytest.raises(vidaccel.ConfigError, match=told):
        linear_from_data(data)


def test_files(tmp_path: Path) -> None:
    text = "name: mine\nrules: []\nlinear: int8\n"
    (tmp_path / "plan.yaml").write_text(text)
    plan = vidaccel.resolve_plan(tmp_path / "plan.yaml")
    assert plan.linear == LinearPlan((LinearRule("int8"),)) and plan.is_dense
    vidaccel.save_plan(plan, tmp_path / "plan.safetensors")
    assert vidaccel.load_plan(tmp_path / "plan.safetensors") == plan
    (tmp_path / "plan.yaml").write_text(text.replace("int8", "[{precision: int8, layers: [0.5]}]"))
    with pytest.raises(vidaccel.PlanFileError, match="LinearRule.layers holds 0.5"):
        vidaccel.resolve_plan(tmp_path / "plan.yaml")


# -- command line ----------------------------------------------------------------------------------------------------


def test_generate_and_inspect(tmp_path: Path) -> None:
    from tests.cli.conftest import SMALL
    from tests.tiny_wan import tiny_wan

    tiny_wan(tmp_path / "model")
    arguments = ["generate", "a red ball", f"--model={tmp_path / 'model'}", "--plan=dense", *SMALL]
    out = tmp_path / "out.mp4"
    done = CliRunner().invoke(app, [*arguments, "--linear=int8", f"--output={out}"])
    assert done.exit_code == 0, done.output
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["linear"] == "int8" and sum(len(row["layers"]) for row in told["report"]["linear"]) == 20
    refused = CliRunner().invoke(app, [*arguments, "--linear=int4", f"--output={out}"])
    assert refused.exit_code == 2 and "linear is 'int4'" in refused.output
    doctor = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert doctor["linear"] == why_not_table(doctor["default"]["device"])
    plan = vidaccel.Plan("ffn", linear=LinearPlan((LinearRule("int8", ("blocks.*.ffn.net.2",), (0, 1, 2)),)))
    vidaccel.save_plan(plan, tmp_path / "plan.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "plan.safetensors")], env={"COLUMNS": "200"}).output
    assert "int8: blocks.*.ffn.net.2 in layers 0-2 of any transformer" in shown
