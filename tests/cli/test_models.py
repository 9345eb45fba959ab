"""``vidaccel models`` lists what the registry holds, and nothing of diffusers is missing from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers

from vidaccel.patchers.catalogue import markdown
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
    assert len(counted["patched"]) > 40 and len(counted["dense"]) > 10
    claimed = [name for family in families() for name in family.pipelines]
    claimed += [name for kind in DENSE_ONLY for name in kind.pipelines]
    assert len(claimed) == len(set(claimed)), "a pipeline belongs to one family"
    assert all(hasattr(diffusers, name) for name in claimed), "the newest diffusers has them all"


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


def test_the_page_in_docs_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "MODELS.md").read_text() == markdown(), "vidaccel models --markdown > docs/MODELS.md"
