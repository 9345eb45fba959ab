"""The suite's table of cases against a kernel that runs here, and its plan, time and failures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, gpu_correctness, gpu_suite, tuning
from benchmarks.cuda_attention import Deadline
from benchmarks.gpu_correctness import CASES, Case, check, check_all
from benchmarks.gpu_suite import STAGES, Stage, run_stages
from benchmarks.ours import PLAIN
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import WallClock, measure_ceilings
from vidaccel.errors import KernelError
from vidaccel.kernels import kernels
from vidaccel.kernels.contract import Kernel
from vidaccel.kernels.dispatch import FunctionKernel
from vidaccel.types import VideoGrid

CPU = torch.device("cpu")
SMALL = {"grid": (3, 7, 9), "tile": (2, 4, 4)}


def kernel_of(name: str) -> Kernel:
    return next(kernel for kernel in kernels() if kernel.name == name)


def small(case: Case) -> Case:
    return replace(case, **SMALL)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_gather_path_passes_every_case_it_can_run(case: Case) -> None:
    verdict = check(small(case), kernel_of("torch-sparse"), CPU)
    can = case.precision == "native" and case.skip is None
    assert verdict.status == ("ok" if can else "skipped"), verdict.reason
    assert verdict.figures if can else verdict.reason


@pytest.mark.parametrize("case", [c for c in CASES if c.precision != "native" or c.skip], ids=lambda c: c.name)
def test_the_oracle_itself_passes_the_others(case: Case) -> None:
    assert check(small(case), kernel_of("reference"), CPU).status == "ok"


@pytest.mark.parametrize("name", ["native tail", "int8-fp8", "fp8-tile tail", "native skip", "float32"])
def test_a_wrong_kernel_is_told(name: str) -> None:
    """One row of one head that is ten percent off."""
    right = kernel_of("reference")

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, lse = right(*args, **kwargs)  # type: ignore[misc]
        out[:, 5:40, -1] *= 1.3
        return out, lse

    case = next(case for case in CASES if case.name == name)
    verdict = check(small(case), FunctionKernel("wrong", wrong, lambda request: None), CPU)
    assert verdict.status == "wrong" and "allowed" in str(verdict.reason)


@pytest.mark.parametrize("name", ["native", "int8"])
def test_a_wrong_lse_and_rows_left_unwritten_are_told(name: str) -> None:
    right = kernel_of("reference")
    case = small(next(case for case in CASES if case.name == name))

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out, lse = right(*args, **kwargs)  # type: ignore[misc]
        return out, lse + 1e-3

    def unwritten(*args: Any, **kwargs: Any) -> Any:
        out, lse = right(*args, **kwargs)  # type: ignore[misc]
        out[:, -1] = torch.nan
        return out, lse

    for function, told in ((shifted, "LSE error"), (unwritten, "error")):
        verdict = check(case, FunctionKernel("wrong", function, lambda request: None), CPU)
        assert verdict.status == "wrong" and told in str(verdict.reason)


def test_blocks_of_variable_size_are_judged_too() -> None:
    cases = [small(case) for case in CASES if case.variable]
    assert len(cases) == 4
    found = [check(case, kernel_of("torch-sparse"), CPU) for case in cases]
    assert [verdict.status for verdict in found] == ["ok"] * 4, found
    assert check(cases[0], kernel_of("emulated"), CPU).status == "skipped"


def test_a_kernel_that_raises_is_a_verdict() -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KernelError("it broke")

    verdict = check(small(CASES[0]), FunctionKernel("broken", broken, lambda request: None), CPU)
    assert verdict.status == "failed" and "it broke" in str(verdict.reason)
    assert "it broke" in gpu_correctness.line(verdict)
    late = check_all(kernel_of("torch-sparse"), CPU, cases=CASES[:2], deadline=Deadline(-1))
    assert [v.status for v in late] == ["skipped"] * 2


def test_the_table_covers_what_it_must() -> None:
    assert {case.precision for case in CASES} >= {"native", "int8", "int8-fp8", "fp8-tile"}
    assert {case.head_dim for case in CASES} >= {64, 96, 128, 256}
    assert {case.dtype for case in CASES} == {"bfloat16", "float16", "float32"}
    for precision in ("native", "int8", "int8-fp8", "fp8-tile"):
        mine = [case for case in CASES if case.precision == precision]
        assert any(c.tail and c.batch > 1 and c.text and len(set(c.densities)) > 1 for c in mine)
        assert any(c.skip for c in mine) and any(c.strided for c in mine) and any(not c.lse for c in mine)
    assert len({case.name for case in CASES}) == len(CASES)


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_suite.main(["--dry-run", "--minutes", "8", "--out", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    for stage in STAGES:
        assert f"{stage.name}: " in out and f"{stage.name}.json" in out
    assert "hunyuan" in out and "end-to-end: 58 s" in out
    assert not (tmp_path / "x").exists()
    assert gpu_suite.main(["--dry-run", "--stages", "tuning"]) == 0
    assert "correctness" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
@pytest.mark.parametrize("main", [gpu_suite.main, gpu_correctness.main])
def test_without_cuda_one_sentence_and_exit_code_2(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no CUDA device") and error.count("\n") == 1


def test_minutes_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--minutes", "0"])
    assert "give more than 0" in capsys.readouterr().err


def test_a_broken_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    def breaks(device: torch.device, deadline: Deadline) -> dict[str, Any]:
        raise torch.OutOfMemoryError("out of memory")

    seen: list[float] = []

    def works(device: torch.device, deadline: Deadline) -> dict[str, Any]:
        seen.append(deadline.left())
        return {"rows": [1]}

    stages = (
        Stage("a", 0.5, list, breaks),
        Stage("b", 0.25, list, works),
        Stage("c", 0.25, list, lambda device, deadline: {"ok": False}),
        Stage("d", 0.25, list, lambda device, deadline: {"skipped": True, "reason": "not here"}),
    )
    outcomes = run_stages(stages, CPU, 100.0, tmp_path / "new")
    assert [outcome.status for outcome in outcomes] == ["failed", "ok", "wrong", "skipped"]
    # what the first did not use went to those after it
    assert seen[0] == pytest.approx(100 / 3, rel=0.05)
    records = {stage.name: json.loads((tmp_path / "new" / f"{stage.name}.json").read_text()) for stage in stages}
    assert records["a"]["reason"] == "OutOfMemoryError: out of memory" and records["b"]["rows"] == [1]
    assert all(record["environment"] and record["date"] for record in records.values())


def test_end_to_end_step_dense_and_by_plan() -> None:
    config = dict(
        end_to_end.TRANSFORMER,
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=32,
        ffn_dim=32,
        freq_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    record = end_to_end.measure_plans(config, (16, 5, 16, 20), CPU, None, Deadline(120), dtype=torch.float32)
    assert record["ok"] and [row["plan"] for row in record["rows"]] == ["dense", "sta", "dense", "radial", "dense"]
    for row in record["rows"]:
        assert row["seconds"] > 0 and row["rounds"] >= 3
        if row["plan"] != "dense":
            assert row["finite"] and row["speedup"] > 0 and row["report"]


def test_stages_run_here_up_to_the_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a CPU in the GPU's place: correctness has nothing it can run, attention and tuning say so row by row."""
    shape = Shape("small", VideoGrid(5, 7, 9), 2, 16)
    monkeypatch.setattr(gpu_suite, "CudaClock", lambda device: WallClock())
    monkeypatch.setattr(gpu_suite, "measure_ceilings", lambda *args: measure_ceilings(WallClock(), CPU, 64, 2))
    monkeypatch.setattr(gpu_suite, "_SHAPES", ("small",))
    monkeypatch.setitem(SHAPES, "small", shape)
    monkeypatch.setattr(tuning, "_GRID", shape.grid)
    stages = {stage.name: stage for stage in STAGES}

    correctness = stages["correctness"].run(CPU, Deadline(60))
    assert correctness["ok"] and correctness["skipped_cases"] == len(CASES)
    assert {row["kernel"] for row in correctness["cases"]} == {PLAIN}

    attention = stages["attention"].run(CPU, Deadline(60))
    assert attention["ok"] and attention["ceilings"]["bf16"] > 0 and attention["ceilings"]["bytes_per_second"] > 0
    ours = [row for row in attention["rows"] if row["kernel"] == "triton"]
    # four precisions, dense once and four densities of two masks without and with the tail
    assert len(ours) == 4 * (1 + 4 * 2 * 2) and all(row["status"] == "skipped" and row["reason"] for row in ours)
    assert all(row["seconds"] for row in attention["rows"] if row["kernel"] == "layout")

    swept = stages["tuning"].run(CPU, Deadline(60))
    assert not swept["ok"] and len(swept["rows"]) == 8
    assert all("cannot be timed on cpu" in row["reason"] for row in swept["rows"])
    assert "no Hopper" in capsys.readouterr().out
    late = stages["tuning"].run(CPU, Deadline(-1))
    assert all(row["reason"] == "the time given was over" for row in late["rows"])


def test_end_to_end_without_diffusers_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    record = end_to_end.run(CPU, Deadline(1))
    assert record["skipped"] and "diffusers cannot be imported" in record["reason"]
