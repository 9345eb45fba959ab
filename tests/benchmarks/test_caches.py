"""The benchmark of step caches beside plans: every row once, resumed, and in one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.caches import MARKS, measure, table
from benchmarks.system_store import Store, read_rows
from benchmarks.system_tables import put_into
from tests.tiny_wan import tiny_wan
from vidaccel.configs.plan import Plan
from vidaccel.configs.presets import resolve_plan
from vidaccel.errors import ConfigError
from vidaccel.pipelines.generate import Request

KEY = ("plan", "cache", "prompt", "seed")
SMALL = {"height": 48, "width": 64, "num_frames": 17, "num_inference_steps": 6, "max_sequence_length": 16}


@pytest.mark.full
def test_rows_are_made_once_and_tabled(tmp_path: Path) -> None:
    path, pipe = tmp_path / "rows.json", tiny_wan()
    requests = [Request(text, seed, SMALL) for seed, text in enumerate(("a red ball", "a blue cat"))]
    plans, caches = {"dense": Plan.dense(), "gna": resolve_plan("gna")}, ("none", "taylorseer:2")
    measure(pipe, plans, caches, requests[:1], Store(path, {"model": "tiny"}, KEY))
    measure(pipe, plans, caches, requests, Store(path, {"model": "tiny"}, KEY))
    rows = read_rows([path], KEY)
    assert len(rows) == len(json.loads(path.read_text())["rows"]) == 2 * 2 * 2
    by_name = {(row["plan"], row["cache"]): row for row in rows if row["seed"] == 0}
    plain, cached = by_name["dense", "none"], by_name["dense", "taylorseer:2"]
    assert float(plain["psnr"]) == float("inf") and plain["calls"] == 6 * 2 * 2
    assert cached["calls"] < plain["calls"] and cached["latent_error"] > 0
    assert by_name["gna", "taylorseer:2"]["calls"] == cached["calls"]

    made = table(rows)
    lines = made.splitlines()
    assert lines[0] == "2 prompts." and len(lines) == 4 + 4
    assert lines[4].startswith("| `dense` | none | identical | 1.000") and lines[4].endswith("| 1.00 |")
    assert lines[5].startswith("| `dense` | `taylorseer:2` | ") and f"| {cached['calls'] / 24:.2f} |" in lines[5]
    text = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    assert put_into(text, made, MARKS) == f"before\n{MARKS[0]}\n{made}\n{MARKS[1]}\nafter\n"
    with pytest.raises(ConfigError, match="caches: begin"):
        put_into("no marks", made, MARKS)
    with pytest.raises(ConfigError, match="another protocol"):
        Store(path, {"model": "other"}, KEY)
