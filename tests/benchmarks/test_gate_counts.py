"""The instruction counts' file: made of rows in order, and a run that was interrupted goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.gate_counts import Journal, written

ROW: dict[str, Any] = {"arch": 90, "tail": False, "counts": {"products": {"bf16": 2.0**21}, "warps": 8}}


def test_rows_are_read_back_as_plain_data() -> None:
    text = written([ROW, ROW | {"tail": True}], "3.6.0")
    assert yaml.safe_load(text) == [ROW, ROW | {"tail": True}]
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("with Triton 3.6.0" in line for line in header)


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "counts.unfinished"
    first = Journal(path, "sources one")
    first.add("a", ROW)
    first.add("b", ROW | {"arch": 80})
    with path.open("a") as file:
        file.write('["c", {"arch"')  # the run ended here
    second = Journal(path, "sources one")
    assert second.rows == {"a": ROW, "b": ROW | {"arch": 80}}
    second.add("c", ROW)
    assert set(Journal(path, "sources one").rows) == {"a", "b", "c"}
    second.close()
    assert not path.exists()


def test_rows_of_other_sources_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "counts.unfinished"
    Journal(path, "sources one").add("a", ROW)
    assert not Journal(path, "sources two").rows
    assert not Journal(path, "sources one").rows  # and not found again later
