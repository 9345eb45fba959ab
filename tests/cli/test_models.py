"""``vidaccel models`` lists what the registry holds, and nothing of diffusers is missing from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.patchers.test_zoo import CASES
from vidaccel.patchers import catalogue
from vidaccel.patchers.catalogue import IMAGES, count, markdown, modular_pipelines, video_pipelines
from vidaccel.patchers.dense_only import DENSE_ONLY
from vidaccel.patchers.registry import families

ROOT = Path(__file__).parents[2]


def test_json_holds_every_family(vidaccel: Callable[..., Any]) -> None:
    told = json.loads(vidaccel("models", "--json").stdout)
    names = [family.name for family in families()] + [kind.name for kind in DENSE_ONLY]
    assert [row["family"] for row in told["families"]] == names
    wan = next(row for row in told["families"] if row["family"] == "wan")
    assert "WanPipeline" in wan["pipelines"] and "WanTransformer3DModel" in wan["transformers"]
    assert any("cross-attention" in text for text in wan["stays_dense"]) and wan["once"]
    latte = next(row for row in told["families"] if row["family"] == "latte")
    assert not latte["patched"] and "too short to gain" in latte["stays_dense"][0]


def test_no_video_pipeline_of_diffusers_is_unknown(vidaccel: Callable[..., Any]) -> None:
    counted = json.loads(vidaccel("models", "--json", "--count").stdout)["count"]
    assert counted["unknown"] == []
    assert len(counted["patched"]) >= 48 and len(counted["dense"]) >= 29
    assert counted["modular_unknown"] == [] and counted["not_importable"] == []
    assert len(counted["modular_patched"]) >= 13 and len(counted["modular_dense"]) >= 5
    claimed = [name for family in families() for name in family.pipelines]
    claimed += [name for kind in DENSE_ONLY for name in kind.pipelines]
    assert len(claimed) == len(set(claimed)), "a pipeline belongs to one family"
    assert all(hasattr(diffusers, name) for name in claimed), "the newest diffusers has them all"
    assert {*claimed} == {*video_pipelines()}, "the rule that finds video pipelines finds all that are known"
    assert all(hasattr(diffusers, name) for name in IMAGES) and not {*IMAGES} & {*claimed}
    models = [name for family in families() if family.pipelines for name in family.transformers]
    models += [name for kind in DENSE_ONLY for name in kind.models]
    assert [name for name in models if not hasattr(diffusers, name)] == []
    assert {"WanModularPipeline", "WanAnimate2ModularPipeline", "LTXModularPipeline"} <= {*modular_pipelines()}


def test_pipelines_of_a_family_that_stay_dense_are_not_counted_as_patched() -> None:
    """Exactly those that no row of the zoo runs sparse."""
    dense = {name for family in families() for name, _ in family.dense_pipelines}
    assert dense <= {name for family in families() for name in family.pipelines}
    rows = {True: set(), False: set()}  # type: dict[bool, set[str]]
    for case in CASES:
        rows[case.sparse].add(case.pipeline.split("-")[0])
    assert dense == rows[False] - rows[True]
    assert rows[True] | dense == {name for family in families() for name in family.pipelines}
    counted = count()
    assert dense <= {*counted["dense"]} and not dense & {*counted["patched"]}
    assert all(f"`{name}`: it gives coordinates" in markdown() for name in dense)


def test_readme_names_the_number_of_patched_pipelines() -> None:
    assert f"the {len(count()['patched'])} video pipelines of diffusers" in (ROOT / "README.md").read_text()


def test_a_pipeline_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "BrokenVideoPipeline":
            raise RuntimeError("Failed to import diffusers.pipelines.broken")
        raise AttributeError(name)

    names = [*dir(diffusers), "BrokenVideoPipeline"]
    monkeypatch.setattr(diffusers, "__getattr__", broken, raising=False)
    monkeypatch.setattr(type(diffusers), "__dir__", lambda self: names)
    catalogue._classes.cache_clear()
    try:
        counted = count()
    finally:
        catalogue._classes.cache_clear()
    assert counted["not_importable"] == ["BrokenVideoPipeline"] and "WanPipeline" in counted["patched"]


def test_no_video_transformer_of_diffusers_is_unknown() -> None:
    known = {name for family in families() for name in family.transformers}
    known |= {name for kind in DENSE_ONLY for name in kind.models}
    there = {name for name in dir(diffusers) if name.endswith("Transformer3DModel")}
    images = {"JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"}
    assert there - images <= known


def test_the_tables_say_what_is_patched_and_what_is_not(vidaccel: Callable[..., Any]) -> None:
    shown = vidaccel("models", env={"COLUMNS": "120"}).stdout
    for words in ("WanVACEPipeline", "SkyReelsV2", "self-attention", "stays dense", "cross-attention", "--strict"):
        assert words in shown, words
    assert "LatteTransformer3DModel" in shown and "in every layer" in shown
    assert "once a forward pass where safe" in shown and "without a listed transformer is refused" in shown


def test_the_page_in_docs_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "MODELS.md").read_text() == markdown(), "vidaccel models --markdown > docs/MODELS.md"
