"""A plan as numbers: the heat-map holds what the plan looks up."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.configs.presets import load_preset, preset_names
from vidaccel.errors import ConfigError, OutputError
from vidaccel.layout import TokenLayout
from vidaccel.patterns.registry import build_pattern
from vidaccel.report import describe_patterns, draw_heatmap, heatmap_panels, plan_facts, rule_row, shown_extent
from vidaccel.types import TileShape, VideoGrid

pytestmark = pytest.mark.full

LAYOUT = TokenLayout.of(VideoGrid(4, 6, 6), TileShape(2, 2, 2))
NARROW = HeadPolicy(PatternSpec.make("neighborhood", window=(0.5, 0.4, 0.4)))
PLAN = Plan(
    "mixed",
    (
        Rule(LayerPolicy(), noise=(0.9, 1.0)),
        Rule(LayerPolicy((NARROW, HeadPolicy())), layers=(0, 1, 3), branch="cond"),
        Rule(LayerPolicy((NARROW,)), transformer="transformer_2"),
    ),
)


def test_panels_are_what_the_plan_looks_up() -> None:
    panels = dict(heatmap_panels(PLAN, LAYOUT, layers=5, heads=2))
    low = build_pattern(NARROW.pattern).density(LAYOUT)
    assert low < 1
    assert list(panels) == [
        "noise 0.9 to 1, cond",
        "noise 0 to 0.9, cond",
    ]
    assert (panels["noise 0.9 to 1, cond"] == 1).all()
    expected = np.array([[low, 1], [low, 1], [low, low], [low, 1], [low, low]])
    assert np.array_equal(panels["noise 0 to 0.9, cond"], expected)


def test_the_extent_is_the_models_or_what_rules_tell_apart() -> None:
    assert shown_extent(PLAN, None, None) == (5, 2, "layer 4 stands for all further ones")
    assert shown_extent(load_preset("sta"), None, None) == (
        1, 1, "layer 0 stands for all further ones; head 0 stands for all",
    )  # fmt: skip
    made = Plan("made", PLAN.rules, fingerprint=Fingerprint(layers=30, heads=2))
    assert shown_extent(made, None, None) == (30, 2, "")
    assert shown_extent(made, 4, None) == (4, 2, "")
    with pytest.raises(ConfigError, match="policies for 2 heads"):
        shown_extent(PLAN, None, 3)


def test_rules_in_words() -> None:
    noise, transformer, layers, branch, policy, density = rule_row(PLAN.rules[1], LAYOUT)
    assert (noise, transformer, layers, branch) == ("0 to 1", "any", "0-1, 3", "cond")
    assert policy.splitlines() == [f"1 heads: {NARROW}", "1 heads: dense"]
    assert float(density) == pytest.approx((1 + build_pattern(NARROW.pattern).density(LAYOUT)) / 2, abs=1e-3)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_shown_and_drawn(tmp_path: Path, name: str) -> None:
    plan = load_preset(name)
    layout = TokenLayout.of(VideoGrid(8, 12, 16), plan.tile)
    facts = dict(plan_facts(plan, layout))
    assert facts["summary"] and facts["made for"] == "any model" and "8x12x16" in facts["densities shown for"]
    sparse = {head.pattern for rule in plan.rules for head in rule.policy.heads if head.pattern.name != "dense"}
    assert len(describe_patterns(plan, layout)) == len(sparse)
    draw_heatmap(tmp_path / "map.png", name, heatmap_panels(plan, layout, 6, 3), note="a note")
    assert cv2.imread(str(tmp_path / "map.png")).std() > 10, "an empty picture"


def test_a_heatmap_of_many_panels_is_drawn_or_refused(tmp_path: Path) -> None:
    panels = [(f"panel {i}", np.full((40, 24), i / 7)) for i in range(7)]
    draw_heatmap(tmp_path / "map.png", "seven", panels)
    height, width, _ = cv2.imread(str(tmp_path / "map.png")).shape
    assert height > 600 and width > 600
    with pytest.raises(OutputError, match=r"name it map\.png"):
        draw_heatmap(tmp_path / "map.pdf", "seven", panels)
