"""The benchmark's gate and arithmetic, on a grid small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention
from vidaccel.device import has_cpp_compiler
from vidaccel.kernels.dispatch import FunctionKernel
from vidaccel.kernels.torch_sparse import block_sparse_attention, why_not
from vidaccel.types import TileShape, VideoGrid


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GRID", VideoGrid(4, 8, 8))
    monkeypatch.setattr(attention, "TILE", TileShape(2, 4, 4))
    monkeypatch.setattr(attention, "HEADS", 2)
    monkeypatch.setattr(attention, "HEAD_DIM", 16)


def test_measures_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "figures.json"
    threads = torch.get_num_threads()
    try:
        attention.main(["--device", "cpu", "--quick", "--threads", "1", "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    record = json.loads(path.read_text())
    assert record["threads"] == 1 and record["rounds"] == 3 and record["environment"]["packages"]
    # each dtype: dense, and three densities without and with the tail
    kernels = ["torch-sparse", "flex"] if has_cpp_compiler() else ["torch-sparse"]
    assert [row["kernel"] for row in record["rows"]] == 14 * kernels
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("float32", "bfloat16"))]
    assert len(shown) == len(record["rows"])
    for row in record["rows"]:
        assert row["seconds"] > 0
        assert row["fraction_of_ideal"] == pytest.approx(row["speedup"] * row["density"])
    assert {round(row["density"], 3) for row in record["rows"]} == {1.0, 0.5, 0.25, 0.125}


def test_a_wrong_kernel_ends_the_run_before_a_time_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        out = block_sparse_attention(*args, **kwargs)  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        out[:, 7, -1] *= 1.5  # one row of one head
        return out

    monkeypatch.setattr(attention, "_kernels", lambda request: [FunctionKernel("wrong", wrong, why_not)])
    with pytest.raises(SystemExit, match="wrong is wrong at .*allowed"):
        attention.measure(torch.float32, 1)
    assert capsys.readouterr().out == ""


def test_threads_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention.main(["--threads", "0"])
    assert "give at least 1" in capsys.readouterr().err
