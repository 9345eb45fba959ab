"""Plans: what runs how, as frozen objects, as one file, and as presets."""

from __future__ import annotations

from .artifact import FORMAT_VERSION, load_plan, save_plan
from .codec import plan_from_data, plan_to_data
from .fingerprint import Fingerprint
from .pattern_spec import CompensationSpec, PatternSpec
from .plan import BRANCHES, TRANSFORMERS, HeadPolicy, LayerPolicy, Plan, Rule
from .presets import load_preset, load_yaml_plan, preset_names, resolve_plan

__all__ = [
    "BRANCHES",
    "FORMAT_VERSION",
    "TRANSFORMERS",
    "CompensationSpec",
    "Fingerprint",
    "HeadPolicy",
    "LayerPolicy",
    "PatternSpec",
    "Plan",
    "Rule",
    "load_plan",
    "load_preset",
    "load_yaml_plan",
    "plan_from_data",
    "plan_to_data",
    "preset_names",
    "resolve_plan",
    "save_plan",
]
