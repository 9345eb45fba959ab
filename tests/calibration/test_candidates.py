"""Candidate sets: what ships, what users write, and what is left out with a reason."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.configs.test_published import entry_of
from vidaccel.calibration.candidates import CandidateSet, candidate_names, load_candidates, usable
from vidaccel.calibration.predicted import predict_costs
from vidaccel.configs import HeadPolicy, PatternSpec
from vidaccel.configs.pattern_spec import CompensationSpec
from vidaccel.configs.presets import load_preset, preset_names
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_pattern
from vidaccel.patterns.base import StaticPattern
from vidaccel.types import KERNEL_PRECISIONS, TileShape, VideoGrid

SHIPPED = Path(__file__).parents[2] / "vidaccel/calibration/candidates"
SMALL, WAN = VideoGrid(16, 12, 12), VideoGrid(21, 30, 52)

GOOD = """
name: mine
summary: Two windows.
patterns:
  - dense
  - {name: sliding_tile, window: [1.0, 0.1, 0.1]}
  - {name: sliding_tile, window: [0.1, 1.0, 1.0]}
compensations: [none, pooled_tail]
precisions: [native, int8]
"""


def own(tmp_path: Path, text: str = GOOD) -> CandidateSet:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return load_candidates(path)


def policy(*window: float, tail: bool = False, precision: str = "native") -> HeadPolicy:
    spec = PatternSpec.make("sliding_tile", window=window)
    return HeadPolicy(spec, precision, "pooled_tail" if tail else "none")


def shipped_data(name: str) -> dict:
    return yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())


def static_part(name: str, tmp_path: Path) -> CandidateSet:
    """A shipped set without its run-time patterns."""
    data = shipped_data(name)
    data["patterns"] = [p for p in data["patterns"] if p == "dense" or "density" not in p]
    return own(tmp_path, yaml.safe_dump(data))


def test_skip_factors_are_part_of_the_product(tmp_path: Path) -> None:
    found = own(tmp_path, GOOD + "skips: [0, 2.5]\n")
    assert len(found.policies) == 2 * len(own(tmp_path).policies)
    assert [policy.skip for policy in found.policies[:2]] == [0.0, 2.5] and found.policies[0].is_dense
    with pytest.raises(ConfigError, match="HeadPolicy.skip is -1"):
        own(tmp_path, GOOD + "skips: [-1]\n")


def test_single_policies(tmp_path: Path) -> None:
    """They stand behind the product, as a plan writes them, and their mistakes are found where they are."""
    one = "policies:\n  - {pattern: {name: pooled_top_k, density: 0.2}, compensation: {name: merged_keys, parts: 4}}\n"
    found = own(tmp_path, GOOD + one)
    rule = CompensationSpec.make("merged_keys", parts=4)
    assert found.policies[-1] == HeadPolicy(PatternSpec.make("pooled_top_k", density=0.2), compensation=rule)
    assert found.policies[:-1] == own(tmp_path).policies
    for wrong, message in {
        "policies: []\n": "give a list of at least one",
        "policies:\n  - {compensation: none}\n": "policy 1: a policy has no 'pattern'",
        "policies:\n  - {pattern: dense, compensation: {name: merged}}\n": "policy 1: .*merged",
        "policies:\n  - {pattern: dense}\n": "policy 1: dense is in the set already",
        one + one.split("\n", 1)[1]: "policy 2: .* is in the set already",
    }.items():
        with pytest.raises(ConfigError, match=message):
            own(tmp_path, GOOD + wrong)


def test_the_set_of_systems_has_every_training_free_one() -> None:
    """Patterns and compensations of all presets that need no trained weights and change more than the arithmetic."""
    apart = {"vsa", "sla", "seer", "binary", "fps", "vidaccel", "dense"} | {
        n for n in preset_names() if n[:4] == "sage"
    }
    set_of = load_candidates("systems")
    patterns = {p.pattern.name for p in set_of.policies}
    rules = {p.compensation.name for p in set_of.policies}
    for name in {n for n in preset_names() if entry_of(n)["paper"]} - apart:  # the others are nobody's system
        for head in (head for rule in load_preset(name).rules for head in rule.policy.heads):
            assert head.pattern.name in patterns, name
            assert head.compensation.name in rules, name
            assert not head.skip or any(p.skip for p in set_of.policies), name


def test_the_set_is_a_product_with_dense_first(tmp_path: Path) -> None:
    found = own(tmp_path)
    assert (found.name, found.summary, found.tile) == ("mine", "Two windows.", None)
    assert found.policies[0] == HeadPolicy() and HeadPolicy(precision="int8") in found.policies
    assert len(found.policies) == 2 + 2 * 2 * 2  # dense has nothing to compensate
    assert policy(0.1, 1.0, 1.0, tail=True, precision="int8") in found.policies
    without = own(tmp_path, GOOD.replace("  - dense\n", "") + "tile: [4, 4, 4]\n")
    assert without.policies[0].is_dense and len(without.policies) == 1 + 8
    assert without.tile == TileShape(4, 4, 4)


@pytest.mark.parametrize("name", ["cpu", "cuda", "systems"])
def test_shipped_sets_load(name: str) -> None:
    found = load_candidates(name)
    assert found.name == name and found.summary.endswith(".")
    assert {p.pattern.name for p in found.policies} >= {"pooled_top_k", "error_routing", "sliding_tile", "radial"}
    if name == "cpu":
        assert 40 <= len(found.policies) <= 65
    elif name == "cuda":
        assert {p.precision for p in found.policies} == set(KERNEL_PRECISIONS)


def test_shipped_sets_belong_together() -> None:
    """CUDA has the same patterns as the CPU, and dense attention in fewer bits."""
    assert candidate_names() == ["cpu", "cuda", "systems"]
    cpu, cuda = shipped_data("cpu"), shipped_data("cuda")
    assert cuda["patterns"] == ["dense", *cpu["patterns"]]
    assert set(cuda["precisions"]) <= set(KERNEL_PRECISIONS) and cpu["precisions"] == ["native"]


@pytest.mark.parametrize("grid", [SMALL, WAN], ids=str)
def test_densities_are_spread(grid: VideoGrid, tmp_path: Path) -> None:
    """On both grids: something very sparse, something nearly dense, and no wide gap between."""
    layout = TokenLayout.of(grid)
    kept, _ = usable(static_part("cpu", tmp_path), layout, device="cpu", dtype=torch.float32, head_dim=64)
    patterns = [build_pattern(p.pattern) for p in kept if p.compensation.name == "none"]
    found = sorted(p.density(layout) for p in patterns if isinstance(p, StaticPattern))
    assert len(found) >= 15 and found[0] < 0.06 and found[-1] == 1.0
    between = [d for d in found if 0.06 <= d <= 0.75]
    assert max(b - a for a, b in itertools.pairwise(between)) < 0.25
    assert between[-1] > 0.5


def test_comments_give_the_densities() -> None:
    """The figures beside the patterns are what comes out on the two grids."""
    layouts = [TokenLayout.of(SMALL), TokenLayout.of(WAN)]
    lines = (SHIPPED / "cpu.yaml").read_text().split("patterns:\n", 1)[1]
    comments = [line.rsplit("# ", 1)[1].split() for line in lines.splitlines() if "  # ." in line]
    static = [p for p in shipped_data("cpu")["patterns"] if "density" not in p]
    assert len(comments) == len(static)
    for data, said in zip(static, comments, strict=True):
        pattern = build_pattern(PatternSpec.from_data(data))
        for layout, text in zip(layouts, said, strict=True):
            assert pattern.density(layout) == pytest.approx(float(text), abs=0.0051), (data, layout)


def test_what_comes_out_alike_is_kept_once(tmp_path: Path) -> None:
    """On 16x8x8 tokens a column of a quarter of the axes is the column of a tenth."""
    text = GOOD.replace("  - dense\n", "").replace("[0.1, 1.0, 1.0]", "[1.0, 0.3, 0.3]").replace(", int8", "")
    layout = TokenLayout.of(VideoGrid(16, 8, 8), TileShape(4, 4, 4))
    kept, reasons = usable(own(tmp_path, text), layout, device="cpu", dtype=torch.float32, head_dim=64)
    first = policy(1.0, 0.1, 0.1)
    assert kept == (HeadPolicy(), first, replace(first, compensation="pooled_tail"))
    assert reasons == {
        policy(1.0, 0.3, 0.3): f"keeps the same blocks of a 16x8x8 grid as {first}",
        policy(1.0, 0.3, 0.3, tail=True): f"keeps the same blocks of a 16x8x8 grid as {first} + pooled_tail",
    }


def test_full_masks_are_dense(tmp_path: Path) -> None:
    text = GOOD.replace("  - dense\n", "").replace("[0.1, 1.0, 1.0]", "[1.0, 1.0, 1.0]").replace(", int8", "")
    kept, reasons = usable(
        own(tmp_path, text), TokenLayout.of(SMALL, text_tokens=5), device="cpu", dtype=torch.float32, head_dim=64
    )
    assert len(kept) == 3
    assert reasons[policy(1.0, 1.0, 1.0)] == "keeps the same blocks of a 16x12x12 grid as dense"
    assert "nothing is left to compensate" in reasons[policy(1.0, 1.0, 1.0, tail=True)]


def test_what_no_kernel_runs_is_left_out(tmp_path: Path) -> None:
    found = own(tmp_path)
    kept, reasons = usable(found, TokenLayout.of(SMALL), device="cpu", dtype=torch.float32, head_dim=64)
    assert {p.precision for p in kept} == {"native"} and len(kept) == 5
    assert set(kept) | set(reasons) == set(found.policies)
    for left, reason in reasons.items():
        assert left.precision == "int8" and "it is only emulated on cpu" in reason
    with pytest.raises(ConfigError, match="nothing is known about a GPU 'gpu'; known are A100"):
        usable(found, TokenLayout.of(SMALL), device="gpu", dtype=torch.float32, head_dim=64)


def test_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    found = own(tmp_path, GOOD.replace("int8]", "int8, fp8-tile]"))
    layout = TokenLayout.of(WAN)
    kept, _ = usable(found, layout, device="NVIDIA H200", dtype=torch.bfloat16, head_dim=128)
    assert kept == found.policies
    kept, reasons = usable(found, layout, device="A100", dtype=torch.bfloat16, head_dim=128)
    assert {p.precision for p in kept} == {"native", "int8"} and set(kept) | set(reasons) == set(found.policies)
    assert all("cannot multiply fp8" in reason for reason in reasons.values())
    assert predict_costs(kept, layout, heads=2, head_dim=128, batch=1, dtype=torch.bfloat16, device="A100").table


def test_run_time_patterns_are_kept() -> None:
    found = load_candidates("cpu")
    kept, _ = usable(found, TokenLayout.of(SMALL), device="cpu", dtype=torch.float32, head_dim=64)
    dynamic = [p for p in found.policies if build_pattern(p.pattern).dynamic]
    assert dynamic and set(dynamic) <= set(kept)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("name: mine", "", "name is None; give a text"),
        ("summary: Two windows.", "summary: 3", "summary is 3; give a text"),
        ("compensations: [none, pooled_tail]", "compensations: []", "compensations is []; give a list of at least one"),
        ("compensations: [none, pooled_tail]", "", "compensations is None"),
        ("precisions: [native, int8]", "precisions: native", "precisions is 'native'; give a list"),
        ("[native, int8]", "[native, int3]", "pattern 1: HeadPolicy.precision is 'int3'"),
        ("[none, pooled_tail]", "[none, magic]", "pattern 1: no compensation is called 'magic'"),
        ("- dense", "- dens", "pattern 1: no pattern is called 'dens'"),
        ("window: [1.0, 0.1, 0.1]", "windows: 3", "pattern 2: pattern 'sliding_tile' has no parameter windows"),
        ("[1.0, 0.1, 0.1]", "[1.0, 2.5, 0.1]", "pattern 2: sliding_tile: window along height is 2.5"),
        ("[0.1, 1.0, 1.0]", "[1.0, 0.1, 0.1]", "pattern 3: sliding_tile(window=(1.0, 0.1, 0.1)) comes twice"),
        ("name: mine", "name: mine\nonly: 3", "the set has unknown keys only; valid are name, summary, tile"),
        ("name: mine", "name: mine\nname: mine", "the key 'name' is given twice"),
        ("name: mine", "name: mine\ntile: [4]", "tile is [4]"),
    ],
)
def test_mistakes_are_named(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        own(tmp_path, GOOD.replace(old, new))
    assert str(tmp_path / "own.yaml") in str(caught.value) and says in str(caught.value)


def test_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no set of candidates file .*none.yaml; check the path"):
        load_candidates(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="'tpu' is neither a candidate set nor a file of one; sets are cpu, cuda,"):
        load_candidates("tpu")
    with pytest.raises(ConfigError, match="does not begin with plain dense"):
        CandidateSet("mine", "", None, (policy(0.5, 0.5, 0.5),))
    with pytest.raises(ConfigError, match=r"has sliding_tile\(window=\(0.5, 0.5, 0.5\)\) twice"):
        CandidateSet("mine", "", None, (HeadPolicy(), policy(0.5, 0.5, 0.5), policy(0.5, 0.5, 0.5)))
