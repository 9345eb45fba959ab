"""Every default of every preset against what its authors publish: no difference goes unsaid.

``published/`` has a file for each preset. A preset without one fails, and so does a field without an entry: the files
of the presets decide what is asked. An entry is the published value itself, where the preset has it, or a mapping:

- ``published``: the value, or ``null`` where nothing is published that the field could be set to;
- ``ours``: the preset's;
- ``says``: words of the preset's own text that tell the difference.

``dense`` is the warm-up, counted on the schedule that it is published for, and the layers that stay dense.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml

from vidaccel.compensation import build_compensation
from vidaccel.configs.plan import HeadPolicy, Plan, Rule
from vidaccel.configs.presets import load_preset, preset_names
from vidaccel.engine.noise_level import noise_level
from vidaccel.patterns import Pattern, build_pattern

FOLDER = Path(__file__).with_name("published")

_COGVIDEOX = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
#: The schedules that warm-ups are published for.
SCHEDULES = {
    "flow shift 5": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "flow shift 7": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    "CogVideoX-2B": lambda: diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, **_COGVIDEOX),
}


@cache
def table() -> dict[str, dict[str, Any]]:
    """The committed files by preset."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}


def entry_of(name: str) -> dict[str, Any]:
    """A preset's file; the test fails with the path of the one that is missing."""
    assert name in table(), (
        f"nothing says what is published of the preset {name}; write tests/configs/published/{name}.yaml"
    )
    return table()[name]


def text_of(name: str) -> str:
    """A preset's file in one line, comments without their marks."""
    text = (resources.files("vidaccel.configs") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return " ".join(re.sub(r"(?m)^#\s?", "", text).split())


def leaves(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every parameter of a pattern or compensation with its path, defaults that the file leaves out among them."""
    if isinstance(part, Pattern) or dataclasses.is_dataclass(part):
        yield f"{path}.name", part.name  # type: ignore[union-attr]
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            name = field.metadata.get("parameter", field.name)
            yield from leaves(getattr(part, field.name), f"{path}.{name}")
    elif isinstance(part, tuple) and any(isinstance(item, Pattern) for item in part):
        for number, item in enumerate(part, start=1):
            yield from leaves(item, f"{path}.{number}")
    else:
        yield path, list(part) if isinstance(part, tuple) else part


def fields_of(plan: Plan) -> dict[str, Any]:
    """What a preset sets, by path; rules that are plainly dense are its warm-up and come under ``dense``."""
    sparse = [rule for rule in plan.rules if not rule.policy.is_dense]
    found: dict[str, Any] = {"tile": None if plan.tile is None else list(plan.tile)}
    for number, rule in enumerate(sparse, start=1):
        for path, value in _rule_fields(rule):
            found[path if len(sparse) == 1 else f"{number}.{path}"] = value
    return found


def _rule_fields(rule: Rule) -> Iterator[tuple[str, Any]]:
    (head,) = rule.policy.heads
    blank = Rule(rule.policy)
    for condition in ("noise", "transformer", "layers", "branch"):
        value = getattr(rule, condition)
        if value != getattr(blank, condition):
            yield condition, list(value) if isinstance(value, tuple) else value
    yield from leaves(build_pattern(head.pattern), "pattern")
    yield "precision", head.precision
    if head.compensation.name in ("none", "pooled_tail"):
        yield "compensation.name", head.compensation.name
    else:
        yield from leaves(build_compensation(head.compensation), "compensation")
    if head.skip != HeadPolicy().skip:
        yield "skip", head.skip


def warm_up(plan: Plan, published: dict[str, Any]) -> dict[str, Any]:
    """The same as a preset's entry under ``dense``, counted on that schedule."""
    made = SCHEDULES[published["schedule"]]()
    made.set_timesteps(published["of"])
    levels = [noise_level(timestep, made) for timestep in made.timesteps]
    late = len(plan.rules) + 64  # a layer that no rule names
    dense = [plan.lookup(level, "transformer", late, "cond").is_dense for level in levels]
    steps = dense.index(False)
    assert not any(dense[steps:])
    layers = [layer for layer in range(late) if plan.lookup(0.5, "transformer", layer, "cond").is_dense]
    return {**published, "steps": steps, "layers": layers}


def has_warm_up(plan: Plan) -> bool:
    return any(rule.policy.is_dense for rule in plan.rules)


@pytest.mark.parametrize("name", preset_names())
def test_no_default_differs_unsaid(name: str) -> None:
    entry = entry_of(name)
    found, known, text = fields_of(load_preset(name)), entry["fields"], text_of(name)
    if not load_preset(name).rules:
        found = {}
    assert set(known) == set(found), "an entry for each field, and none for others"
    for path, value in found.items():
        published = known[path]
        if not isinstance(published, dict):
            assert value == published and type(value) is type(published), (path, value, published)
            continue
        assert set(published) == {"published", "ours", "says"}, path
        assert published["ours"] == value, (path, value)
        assert published["published"] != value, f"{path} is as published, so there is nothing to say"
        assert published["says"] in text, (path, published["says"])


@pytest.mark.parametrize("name", preset_names())
def test_warm_ups_are_as_published(name: str) -> None:
    plan, published = load_preset(name), entry_of(name)["dense"]
    if not has_warm_up(plan):
        assert published is None
        return
    if "says" in published:
        assert published["says"] in text_of(name)
        assert published["published"] is None
        published = published["ours"]
    assert set(published) == {"steps", "of", "schedule", "layers"}
    assert warm_up(plan, published) == published
    said = f"{published['steps']} of {published['of']} steps"
    assert said in text_of(name), f"the preset's text says how many steps that is: {said}"


@pytest.mark.parametrize("name", preset_names())
def test_presets_name_their_paper_and_code(name: str) -> None:
    entry, text = entry_of(name), text_of(name)
    for kind in ("paper", "code"):
        link = entry[kind]
        assert link is None or re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|github\.com/[\w./-]+)", link)
        assert f"{kind.title()}: {link or 'none'}" in text
    assert all(where.startswith("https://") for where in entry.get("sources", ()))
    assert set(entry) <= {"paper", "code", "sources", "dense", "fields"}


def test_there_is_no_entry_for_a_preset_that_is_gone() -> None:
    assert set(table()) <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_summaries_are_sentences(name: str) -> None:
    """One paragraph, well filled: no line breaks in odd places, and each sentence begins like one."""
    text = (resources.files("vidaccel.configs") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    summary = dict(load_preset(name).provenance)["summary"]
    assert "\n" not in summary.strip() and "  " not in summary
    sentences = re.split(r"(?<=[a-z)])\. ", summary)
    assert all(sentence[0].isupper() or sentence[0] == "." for sentence in sentences) and summary.endswith(".")
    block = re.search(r"(?m)^summary: >-\n((?:  .*\n)+)", text)
    lines = block.group(1).splitlines() if block else []
    for line, following in pairwise(lines):
        first = following.split()[0]
        assert len(line) + 1 + len(first) > 116, f"the summary breaks early: {line}"
