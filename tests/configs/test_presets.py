"""Presets and users' own YAML files: they build, they warm up as published, and mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings

from tests.configs.strategies import plans
from vidaccel.configs.artifact import load_plan, save_plan
from vidaccel.configs.codec import plan_from_data, plan_to_data
from vidaccel.configs.plan import HeadPolicy, Plan
from vidaccel.configs.presets import load_preset, load_yaml_plan, preset_names, resolve_plan
from vidaccel.engine.noise_level import noise_level
from vidaccel.errors import ConfigError, PlanFileError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_pattern
from vidaccel.types import TileShape, VideoGrid

SPARSE = ["neighborhood", "radial", "sta", "svg-static"]  # fixed by the token grid
DYNAMIC = [
    "draft", "haste", "hip", "minference", "nabla", "pasa", "rectified", "s2", "sale", "sparge", "svg", "svg-ear",
    "svg-ear-clusters", "svg2", "vsa-free", "xattention",
]  # fmt: skip
QUANTISED = ["binary", "fps", "sage", "sage2", "sage2-int4", "sage3"]  # in few bits, with hardly a pattern
REPAIRED = ["delta", "razor", "rettention"]  # fixed patterns with a compensation of their own
TRAINED = ["seer", "sla", "vsa"]  # for models or gates trained for them
PRESETS = preset_names()

GRIDS = {
    "small model": VideoGrid(16, 12, 12),
    "Wan 480p": VideoGrid(21, 30, 52),
    "Wan 720p": VideoGrid(21, 45, 80),
}


def sparse_head(name: str) -> HeadPolicy:
    """What the preset does in the middle of a run."""
    return load_preset(name).lookup(0.5, "transformer", 3, "cond").for_head(0, 12)


def test_names() -> None:
    files = (Path(__file__).parents[2] / "vidaccel/configs/presets").glob("*.yaml")
    assert sorted(file.stem for file in files) == PRESETS
    known = {*SPARSE, *DYNAMIC, *QUANTISED, *REPAIRED, *TRAINED}
    assert known <= set(PRESETS), "figures below of a preset that is gone"
    for name in PRESETS:
        plan = load_preset(name)
        assert plan.name == name
        assert load_preset(name) is plan
        about = dict(plan.provenance)
        assert about["summary"].endswith(".")
        assert about["source"]
        assert plan.is_dense == (name == "dense")
        assert plan.fingerprint is None  # a preset fits any model


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", SPARSE)
def test_presets_build_and_keep_what_they_say(name: str, grid: VideoGrid) -> None:
    layout = TokenLayout.of(grid, load_preset(name).tile)
    pattern = build_pattern(sparse_head(name).pattern)
    # published densities: sta .15-.2, GNA .09, radial about .3, SVG .34; rounding to blocks and the small grid add
    low, high = {"sta": (0.1, 0.35), "neighborhood": (0.09, 0.2), "radial": (0.2, 0.5), "svg-static": (0.33, 0.36)}[
        name
    ]
    assert low <= pattern.density(layout) <= high


def test_published_windows() -> None:
    """On the grids they were published for, the shares are the published windows again."""
    for canvas, window, tiles in (((18, 48, 80), 27, 180), ((30, 48, 80), 5 * 9, 300), ((36, 48, 48), 6 * 3, 216)):
        sta = TokenLayout.of(VideoGrid(*canvas), load_preset("sta").tile)
        assert build_pattern(sparse_head("sta").pattern).density(sta) == pytest.approx(window / tiles)
    radial = TokenLayout.of(VideoGrid(18, 48, 80), load_preset("radial").tile)
    # in runs of 128 tokens as published it keeps .287
    assert build_pattern(sparse_head("radial").pattern).density(radial) == pytest.approx(0.287, abs=0.01)
    gna = TokenLayout.of(VideoGrid(30, 48, 80), TileShape(6, 8, 8))
    found = build_pattern(sparse_head("neighborhood").pattern).exact_density(gna)
    assert found == pytest.approx(18 * 24 * 24 / (30 * 48 * 80))


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(
            lambda: UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
            ),
            id="UniPC",
        ),
        pytest.param(lambda: FlowMatchEulerDiscreteScheduler(shift=5.0), id="FlowMatchEuler"),
    ],
)
@pytest.mark.parametrize(("name", "steps"), [("neighborhood", 12), ("radial", 12), ("sta", 12), ("svg-static", 10)])
def test_warm_up_in_steps_at_shift_5(name: str, steps: int, scheduler: Callable[[], Any]) -> None:
    """The same by the timesteps of either scheduler; ``test_published.py`` has all presets on their own schedules."""
    made = scheduler()
    made.set_timesteps(50)
    levels = [noise_level(timestep, made) for timestep in made.timesteps]
    dense = [load_preset(name).lookup(level, "transformer", 3, "cond").is_dense for level in levels]
    assert dense == [True] * steps + [False] * (50 - steps)


#: Dense steps of 50 (4, where it says so), on schedules that models come with.
STEPS = {
    "flow shift 3": {"sta": 8, "svg2": 7, "rectified": 3, "rettention": 15, "xattention": 2},
    "flow shift 5": {"sta": 12, "svg2": 10, "rectified": 5, "rettention": 20, "xattention": 4},
    "flow shift 7": {"sta": 15, "svg2": 13, "rectified": 6, "rettention": 24, "xattention": 5},
    "CogVideoX-2B": {"sta": 9, "svg2": 7, "rectified": 4, "rettention": 15, "xattention": 3},
    "CogVideoX-5B": {"sta": 6, "svg2": 5, "rectified": 2, "rettention": 10, "xattention": 2},
    "flow shift 5, 4 steps": {"sta": 1, "svg2": 1, "rectified": 1, "rettention": 2, "xattention": 1},
}
_COGVIDEOX = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("schedule", STEPS)
def test_warm_up_in_steps_on_other_schedules(schedule: str) -> None:
    """What docs/SYSTEMS.md says of them."""
    if schedule.startswith("Cog"):
        made: Any = CogVideoXDDIMScheduler(snr_shift_scale=3.0 if "2B" in schedule else 1.0, **_COGVIDEOX)
    else:
        shift = float(schedule.split()[2].strip(","))
        made = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    steps = 4 if "4 steps" in schedule else 50
    made.set_timesteps(steps)
    levels = [noise_level(timestep, made) for timestep in made.timesteps]
    found = {
        name: sum(load_preset(name).lookup(level, "transformer", 3, None).is_dense for level in levels)
        for name in STEPS[schedule]
    }
    assert found == STEPS[schedule]
    cells = " | ".join(str(count) for count in found.values())
    text = (Path(__file__).parents[2] / "docs/SYSTEMS.md").read_text()
    assert f"| {schedule} | {cells} |" in text


def test_svg_keeps_its_first_layer_dense() -> None:
    plan = load_preset("svg-static")
    assert plan.lookup(0.3, "transformer_2", 0, None).is_dense
    assert not plan.lookup(0.3, "transformer_2", 1, None).is_dense


@pytest.mark.parametrize("name", SPARSE)
def test_dropping_compensation_is_one_word(name: str, tmp_path: Path) -> None:
    """What each summary promises."""
    assert sparse_head(name).compensation.name == "pooled_tail"
    text = (Path(__file__).parents[2] / "vidaccel/configs/presets" / f"{name}.yaml").read_text()
    assert text.count("compensation: pooled_tail") == 1
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("compensation: pooled_tail", "compensation: none"))
    head = load_yaml_plan(own).lookup(0.5, "transformer", 3, "cond").for_head(0, 1)
    assert head == HeadPolicy(sparse_head(name).pattern)


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.uniform("mine", HeadPolicy(precision="int8"))
    yaml_file, plan_file = tmp_path / "mine.yml", tmp_path / "mine.safetensors"
    yaml_file.write_text(yaml.safe_dump(plan_to_data(plan)))
    save_plan(plan, plan_file)
    assert resolve_plan(plan) is plan
    assert resolve_plan(yaml_file) == resolve_plan(str(yaml_file)) == plan
    assert resolve_plan(plan_file) == resolve_plan(str(plan_file)) == plan
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sta").mkdir()
    assert resolve_plan("sta") is load_preset("sta")  # a text without a suffix is a preset's name, whatever exists
    for wrong in ("stta", "mine.pt", Path("sta")):
        with pytest.raises(ConfigError, match=r"neither a preset nor a plan file; .*presets are .*dense, .* end in"):
            resolve_plan(wrong)
    with pytest.raises(ConfigError, match="plan is a int; give a Plan"):
        resolve_plan(3)
    with pytest.raises(ConfigError, match=f"no preset 'stta'; valid are {', '.join(PRESETS)}; did you mean sta"):
        load_preset("stta")


@given(plans)
@settings(max_examples=50)
def test_data_round_trip_through_yaml(plan: Plan) -> None:
    assert plan_from_data(yaml.safe_load(yaml.safe_dump(plan_to_data(plan)))) == plan


GOOD = "name: mine\nrules:\n- {noise: [0.9, 1.0], pattern: dense}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("", "the plan is None; give a mapping with keys among name", id="empty"),
        pytest.param("name: mine", "the plan has no 'rules'", id="no rules"),
        pytest.param("rules: []", "the plan has no 'name'", id="no name"),
        pytest.param(GOOD + "rulez: []", "unknown keys rulez; valid are name, summary", id="unknown key"),
        pytest.param(GOOD + "name: twice", "line 4: the key 'name' is given twice", id="repeated key"),
        pytest.param(GOOD + "tile: [1, 2]", "tile is [1, 2]; give [frames, height, width]", id="short tile"),
        pytest.param(GOOD + "tile: [1, 2, 0]", "TileShape.width is 0", id="empty tile"),
        pytest.param(GOOD + "provenance: 3", "provenance is 3", id="provenance"),
        pytest.param(GOOD + "fingerprint: {headz: 3}", "a fingerprint has unknown keys headz", id="fingerprint"),
        pytest.param(GOOD + "- {pattern: dense, layer: [0]}", "rule 2 has unknown keys layer;", id="rule key"),
        pytest.param(GOOD + "- {precision: int8}", "rule 2 has no 'pattern'", id="no pattern"),
        pytest.param(GOOD + "- {pattern: dense, noise: [0, 2]}", "rule 2: Rule.noise is (0.0, 2.0)", id="noise"),
        pytest.param(GOOD + "- {pattern: dense, precision: int3}", "rule 2: HeadPolicy.precision is", id="precision"),
        pytest.param(GOOD + "- {pattern: dense, heads: []}", "both 'heads' and pattern", id="both"),
        pytest.param(GOOD + "- {heads: 3}", "rule 2: heads is 3", id="heads"),
        pytest.param(GOOD + "- {heads: []}", "rule 2: LayerPolicy.heads is empty", id="no heads"),
        pytest.param(GOOD + "- {heads: [{patern: dense}]}", "head 0 has unknown keys patern", id="head key"),
        pytest.param(GOOD + "- 3", "rule 2 is 3; give a mapping", id="no mapping"),
        pytest.param("name: mine\nrules: 3", "rules is 3; give a list", id="no list"),
        pytest.param("name: 3\nrules: []", "Plan.name is 3", id="name"),
        pytest.param("name: [", "is not valid YAML in line 1", id="no YAML"),
        pytest.param("a: &a 1\nname: *a", "references (*name) are not used", id="reference"),
        pytest.param("name: !!python/object:os.system {}", "could not determine a constructor", id="code"),
        pytest.param("rules: " + "[" * 5000, "nested too deep", id="deep"),
        pytest.param("name: \x01", "is not a plan: ", id="control character"),
        pytest.param("? [a]\n: 3", "found unhashable key", id="odd key"),
    ],
)  # fmt: skip
def test_mistakes_are_named(text: str, says: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(PlanFileError) as caught:
        load_yaml_plan(own)
    assert str(own) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="there is no plan file"):
        load_yaml_plan(tmp_path / "none.yaml")
    with pytest.raises(PlanFileError, match="cannot be read"):
        load_yaml_plan(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: ü".encode("latin-1"))
    with pytest.raises(PlanFileError, match="not text in UTF-8"):
        load_yaml_plan(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(PlanFileError, match="a plan in YAML is a few kB"):
        load_yaml_plan(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    ("typed", "meant"), [("stta", "sta"), ("STA", "sta"), ("sage-2", "sage2"), ("raidal", "radial")]
)
def test_a_slip_of_the_pen_is_seen(typed: str, meant: str) -> None:
    for read in (resolve_plan, load_preset):
        with pytest.raises(ConfigError, match=f"did you mean {meant}[?]"):
            read(typed)
    with pytest.raises(ConfigError) as told:
        resolve_plan("nothing of the kind")
    assert "did you mean" not in str(told.value)


def test_a_preset_is_no_file() -> None:
    with pytest.raises(PlanFileError, match="a preset is read by load_preset"):
        load_plan("sta")
