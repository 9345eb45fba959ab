"""``vidaccel models`` lists what the registry holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vidaccel.patchers.registry import families


def test_json_holds_every_family(vidaccel: Callable[..., Any]) -> None:
    rows = json.loads(vidaccel("models", "--json").stdout)
    assert [row["family"] for row in rows] == [family.name for family in families()]
    wan = next(row for row in rows if row["family"] == "wan")
    assert "WanPipeline" in wan["pipelines"] and "WanTransformer3DModel" in wan["transformers"]
    assert "cross-attention" in wan["stays_dense"]


def test_the_table_says_what_is_patched_and_what_is_not(vidaccel: Callable[..., Any]) -> None:
    shown = vidaccel("models", env={"COLUMNS": "240"}).stdout
    for words in ("WanVACEPipeline", "SkyReelsV2", "self-attention", "stays dense", "cross-attention", "--strict"):
        assert words in shown, words
