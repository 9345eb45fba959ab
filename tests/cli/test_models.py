"""``vidaccel models`` lists what the registry holds, and what diffusers has beyond it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers

from vidaccel.patchers.registry import families


def test_json_holds_every_family(vidaccel: Callable[..., Any]) -> None:
    told = json.loads(vidaccel("models", "--json").stdout)
    assert [row["family"] for row in told["families"]] == [family.name for family in families()]
    wan = next(row for row in told["families"] if row["family"] == "wan")
    assert "WanPipeline" in wan["pipelines"] and "WanTransformer3DModel" in wan["transformers"]
    assert "cross-attention" in wan["stays_dense"]


def test_every_video_transformer_of_diffusers_is_patched_or_has_a_reason(vidaccel: Callable[..., Any]) -> None:
    told = json.loads(vidaccel("models", "--json").stdout)
    patched = {name for row in told["families"] for name in row["transformers"]}
    assert patched.isdisjoint(told["not_patched"]) and all(told["not_patched"].values())
    missing = [name for name in dir(diffusers) if name.endswith("Transformer3DModel")]
    assert set(missing) <= patched | set(told["not_patched"])
    assert "linear attention" in told["not_patched"]["SanaVideoTransformer3DModel"]


def test_the_tables_say_what_is_patched_and_what_is_not(vidaccel: Callable[..., Any]) -> None:
    shown = vidaccel("models", env={"COLUMNS": "120"}).stdout
    for words in ("WanVACEPipeline", "SkyReelsV2", "self-attention", "stays dense", "cross-attention", "--strict"):
        assert words in shown, words
    assert "LatteTransformer3DModel" in shown and "no patcher yet" in shown
