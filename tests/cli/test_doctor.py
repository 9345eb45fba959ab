"""``vidaccel doctor`` tells what runs here, and why the rest does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from vidaccel.kernels.dispatch import kernels
from vidaccel.types import PRECISIONS
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
