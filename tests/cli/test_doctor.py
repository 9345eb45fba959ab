"""``vidaccel doctor`` tells what runs here, and why the rest does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.cli import selftests
from vidaccel.device import has_cpp_compiler
from vidaccel.kernels import dispatch
from vidaccel.kernels.dispatch import kernels
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS
from vidaccel.version import __version__


def test_json_answers_for_every_kernel_and_precision(vidaccel: Callable[..., Any]) -> None:
    told = json.loads(vidaccel("doctor", "--json").stdout)
    assert told["vidaccel"] == __version__ and told["packages"]["torch"] == torch.__version__
    assert told["default"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    pairs = {(row["kernel"], row["precision"]) for row in told["kernels"]}
    assert pairs == {(kernel.name, precision) for kernel in kernels() for precision in PRECISIONS}
    assert any(row["why_not"] is None for row in told["kernels"] if row["precision"] == "native")


def test_reasons_are_shown(vidaccel: Callable[..., Any]) -> None:
    rows = json.loads(vidaccel("doctor", "--json").stdout)["kernels"]
    shown = vidaccel("doctor", env={"COLUMNS": "400"}).stdout
    for row in rows:
        assert (f"no: {row['why_not']}" if row["why_not"] else "yes") in shown
    assert "attention kernels for" in shown and f"torch {torch.__version__}" in shown


@pytest.mark.full
def test_the_kernels_that_run_here_are_tested(
    vidaccel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selftests, "_HEAD_DIMS", (64,))  # each is compiled for FlexAttention
    monkeypatch.setattr(selftests, "_TILES", ((4, 8, 4),))
    told = json.loads(vidaccel("doctor", "--test", "--json").stdout)
    rows = told["self_tests"]
    ran = {row["kernel"] for row in told["kernels"] if row["why_not"] is None} - {"reference"}
    assert {row["kernel"] for row in rows} == ran
    assert all(row["outcome"] == "right" and row["fresh"] for row in rows)
    precisions = {row["call"].split(",")[0] for row in rows}
    assert precisions == set(PRECISIONS)
    assert ("flex" in ran) == has_cpp_compiler()
    elsewhere = {row["calls"].split(",")[0]: row["capability"] for row in told["self_tests_on_cuda"]}
    assert elsewhere["native"] == elsewhere["int8"] == "8.0" and elsewhere["fp8-tile"] == "8.9"
    assert set(elsewhere) >= set(KERNEL_PRECISIONS)
    again = vidaccel("doctor", "--test", env={"COLUMNS": "400"})
    assert not again.stderr, "verdicts are kept"
    assert "right, 0." in again.stdout and "with a CUDA GPU" in again.stdout


def test_a_wrong_kernel_is_shown_and_told_to_scripts(
    vidaccel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def off(q: torch.Tensor, *tensors: Any, **options: Any) -> Any:
        return dispatch.torch_sparse.block_sparse_attention(1.1 * q, *tensors, **options)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = dispatch.FunctionKernel("made here", off, dispatch.torch_sparse.why_not, compiled=True)
    monkeypatch.setattr(dispatch, "_KERNELS", (wrong,))
    done = vidaccel("doctor", "--test", env={"COLUMNS": "400"}, code=1)
    assert "wrong: case 'native, 128 channels'" in done.stdout
    assert "testing kernel made here" in done.stderr
