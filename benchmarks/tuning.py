"""The tuning sweep of the suite: some candidates for each precision and head dim, timed at a real shape.

It only reports. What it finds belongs into ``configs.yaml`` by hand, with the origin ``measured``; users tune their
own device with :func:`vidaccel.kernels.triton.autotune.tune`.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import torch

from vidaccel.kernels.triton.autotune import Workload, sweep
from vidaccel.types import PRECISIONS, VideoGrid

from .cuda_attention import FAILURES, Deadline, reason_of
from .shapes import FORMATS, Shape, make_mask

__all__ = ["DENSITY", "HEAD_DIMS", "plan", "run"]

#: Most important first: each gets its share of the time.
HEAD_DIMS = (128, 64)
DENSITY = 0.2
_GRID, _HEADS = VideoGrid(21, 30, 52), 12


def plan() -> list[str]:
    """What :func:`run` does, a line each."""
    return [
        f"{precision}, head dim {head_dim}: shipped configurations and their neighbours at {_GRID}, density {DENSITY}"
        for head_dim, precision in itertools.product(HEAD_DIMS, FORMATS)
    ]


def run(device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """Seconds of each candidate, the shipped choice first."""
    rows: list[dict[str, Any]] = []
    pairs = list(itertools.product(HEAD_DIMS, FORMATS))
    for done, (head_dim, precision) in enumerate(pairs):
        mine = Deadline(deadline.left() / (len(pairs) - done))  # an equal share, so that none is left out
        row: dict[str, Any] = {"precision": precision, "head_dim": head_dim, "density": DENSITY, "trials": []}
        rows.append(row)
        if deadline.passed():
            row["reason"] = "the time given was over"
            continue
        try:
            shape = Shape("tuning", _GRID, _HEADS, head_dim)
            layout = shape.layout(device)
            mask = make_mask("random", layout, DENSITY, _HEADS)
            workload = Workload(layout, mask, _HEADS, head_dim, tail=True)
            for trial in sweep(workload, PRECISIONS[precision], device):
                row["trials"].append(asdict(trial))
                took = f"{trial.seconds:.6f} s" if trial.seconds is not None else f"- {trial.reason}"
                print(f"{precision:10}{head_dim:4} {trial.config}: {took}", flush=True)
                if mine.passed():
                    row["reason"] = "the time given was over"
                    break
        except FAILURES as error:
            row["reason"] = reason_of(error)
    return {"ok": any(trial["seconds"] is not None for row in rows for trial in row["trials"]), "rows": rows}
