"""The cost model's arithmetic, its data, and that its predictions behave."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cost_check
from benchmarks.shapes import SHAPES, make_mask
from tests.kernels.helpers import make_layout, random_mask
from vidaccel.blockmask import BlockMask
from vidaccel.errors import KernelError
from vidaccel.kernels.triton import costmodel
from vidaccel.kernels.triton.configs import Config, Entry, table
from vidaccel.kernels.triton.costmodel import Hardware, Prediction, Step, check, hardware, predict, step_of
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS

ARCHES = sorted({entry.arch for entry in table()})
NATIVE = PRECISIONS["native"]
WAN = SHAPES["wan-480p-1.3b"]
#: A machine with round numbers: one step of STEP takes 8 cycles of tensor cores, 4, 2 and 1 of the others.
ROUND = Hardware(90, "round", 2, 100.0, 1e12, {"bf16": 128.0}, 16.0, 64.0, 4.0, "made up")
COUNTS = {"products": {"bf16": 1024}, "exponentials": 2, "arithmetic": 4, "issued": 4, "outside": 40}
STEP = Step(90, "native16", 128, False, Config(128, 128, 4, 2), COUNTS)


def entry_id(entry: Entry) -> str:
    return f"{entry.arch}-{entry.kind}-{entry.head_dim}-{entry.config.block_m}x{entry.config.block_n}"


@pytest.mark.parametrize("entry", table(), ids=entry_id)
def test_every_shipped_configuration_was_counted(entry: Entry) -> None:
    """A bias for every score is more work, never less."""
    plain, tail = (step_of(entry.arch, entry.kind, entry.head_dim, entry.config, tail=tail) for tail in (False, True))
    adds_up(plain)
    adds_up(tail)
    assert tail.counts["issued"] > plain.counts["issued"]
    assert tail.counts["products"] == plain.counts["products"]


def adds_up(step: Step) -> None:
    m, n, d = step.config.block_m, step.config.block_n, step.head_dim
    # at least the products of the definition; tf32 takes three for one, and some warps do the same twice
    products = sum(step.counts["products"].values())
    least = 2 * m * n * d * (3 if step.kind == "native32" else 1)
    assert least <= products <= 2 * least
    assert step.counts["exponentials"] >= m * n / 32
    assert step.counts["issued"] > step.counts["arithmetic"] > 0 and step.counts["outside"] > 0
    cycles = step.cycles(hardware(step.arch))
    assert set(cycles) == {"tensor cores", "exponentials", "arithmetic", "issue"}
    assert all(math.isfinite(value) and value > 0 for value in cycles.values())


def test_cycles_of_a_step() -> None:
    assert STEP.cycles(ROUND) == {"tensor cores": 8.0, "exponentials": 4.0, "arithmetic": 2.0, "issue": 1.0}
    lacking = dataclasses.replace(ROUND, products={"fp8": 1.0})
    with pytest.raises(KernelError, match="no tensor-core rate for bf16"):
        STEP.cycles(lacking)


def test_seconds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 blocks of 128 tokens, 3 heads with lists of 4, 2 and 1 pieces, on two multiprocessors."""
    monkeypatch.setattr(costmodel, "_steps", lambda: (STEP,))
    monkeypatch.setattr(costmodel, "choose", lambda *args: STEP.config)
    layout = make_layout((8, 8, 8), (2, 8, 8))
    keep = torch.zeros(3, 4, 4, dtype=torch.bool)
    keep[0] = True
    keep[1, :, :2] = True
    keep[2] = torch.eye(4, dtype=torch.bool)
    found = predict(90, NATIVE, 128, layout, heads=3, mask=BlockMask.from_dense(keep), on=ROUND)
    # each multiprocessor gets two programs of each length: 2 (4 + 2 + 1) steps of 8 cycles, and 10 outside for each
    assert found.seconds == pytest.approx((14 * 8 + 6 * 10) / 100) and found.steps == 28
    # issuing is part of every unit's work, so it does not come on top
    assert found.without_overlap == pytest.approx((14 * 14 + 6 * 10) / 100)
    assert found.predicted is True and found.limit == "tensor cores" and "sm_90" in found.how
    slow = dataclasses.replace(ROUND, bytes_per_second=1e3)
    starved = predict(90, NATIVE, 128, layout, heads=3, density=0.5, on=slow)
    assert starved.limit == "memory" and starved.seconds == pytest.approx(512 * 3 * 128 * 8 / 1e3)


def test_one_long_list_is_a_matter_of_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costmodel, "_steps", lambda: (STEP,))
    monkeypatch.setattr(costmodel, "choose", lambda *args: STEP.config)
    layout = make_layout((64, 8, 8), (2, 8, 8))
    keep = torch.eye(32, dtype=torch.bool)
    keep[0] = True
    mask = BlockMask.from_dense(keep)
    many = dataclasses.replace(ROUND, multiprocessors=32)
    found = predict(90, NATIVE, 128, layout, heads=1, mask=mask, on=many)
    assert found.limit == "balance" and found.seconds == pytest.approx((32 * 8 + 10) / 100)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", KERNEL_PRECISIONS)
def test_predictions_behave(arch: int, name: str) -> None:
    layout = WAN.layout()
    precision = PRECISIONS[name]
    if arch < 89 and "fp8" in (precision.qk, precision.pv):
        with pytest.raises(KernelError, match="of no size"):
            predict(arch, precision, 128, layout, heads=12, density=1.0)
        return
    times = [predict(arch, precision, 128, layout, heads=12, density=d).seconds for d in (1.0, 0.5, 0.1, 0.05)]
    assert times == sorted(times, reverse=True)
    dense = predict(arch, precision, 128, layout, heads=12, density=1.0)
    # no faster than the tensor cores alone, whose rate no kernel exceeds
    on = hardware(arch)
    best = max(on.products[f] for f in ("bf16", "int8", "fp8") if f in on.products) * on.multiprocessors * on.clock
    assert WAN.operations() / 2 / best <= dense.seconds <= dense.without_overlap
    # a tenth of the keys is about a tenth of the work; programs begin and end all the same
    assert 0.09 <= times[2] / times[0] <= 0.25
    assert predict(arch, precision, 128, layout, heads=24, density=0.5).seconds > 1.8 * times[1]
    if arch == 90:
        assert predict(arch, precision, 128, layout, heads=12, density=0.1, tail=True).seconds > times[2]


def test_a_mask_and_its_density_agree() -> None:
    layout = WAN.layout()
    mask = make_mask("random", layout, 0.2, WAN.heads)
    by_mask = predict(90, NATIVE, 128, layout, heads=12, mask=mask)
    by_density = predict(90, NATIVE, 128, layout, heads=12, density=mask.block_density)
    assert by_mask.seconds == pytest.approx(by_density.seconds, rel=0.05)


def test_what_is_refused() -> None:
    layout = make_layout()
    for options in ({}, {"density": 0.5, "mask": random_mask(layout, 1, [0.5])}):
        with pytest.raises(KernelError, match="either a mask or a density"):
            predict(90, NATIVE, 64, layout, heads=1, **options)
    with pytest.raises(KernelError, match="valid is above 0"):
        predict(90, NATIVE, 64, layout, heads=1, density=0.0)
    with pytest.raises(KernelError, match="nothing is known about sm_70"):
        predict(70, NATIVE, 64, layout, heads=1, density=0.5)
    with pytest.raises(KernelError, match="gate_counts"):
        step_of(90, "native16", 64, Config(16, 16, 1, 1), tail=False)


def prediction(seconds: float, without_overlap: float) -> Prediction:
    return Prediction(seconds, without_overlap, "issue", {}, 1, STEP.config, "by hand")


def test_check_compares_with_measurements() -> None:
    pairs = [(prediction(1.0, 2.0), 1.5), (prediction(2.0, 4.0), 5.0), (prediction(3.0, 6.0), 4.5)]
    found = check(pairs)
    assert found.pairs == 3 and found.median == pytest.approx(1.5) and found.most == pytest.approx(2.5)
    assert found.least == pytest.approx(1.5) and found.within == pytest.approx(2 / 3)
    assert found.rank == pytest.approx(2 / 3)  # the second and the third are the wrong way round
    with pytest.raises(KernelError, match="measure on a GPU first"):
        check([])


def results(tmp_path: Path, **changes: Any) -> Path:
    row = {"shape": "wan-480p-1.3b", "kernel": "triton", "precision": "native", "mask": "random", "density": 0.1}
    row |= {"tail": False, "status": "ok", "seconds": 0.01} | changes
    path = tmp_path / "attention.json"
    path.write_text(json.dumps({"environment": {"gpus": [{"capability": [9, 0]}]}, "rows": [row]}))
    return path


def test_results_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_check.main([str(results(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out and "measured 0.010000" in out and "1 pairs" in out
    assert cost_check.main([str(results(tmp_path, status="failed"))]) == 1
    assert "measure on a GPU first" in capsys.readouterr().err


def test_predictions_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost_check.main(["--predict", "90"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("predicted for H200") and "not measured" in out and "fp8-tile" in out
