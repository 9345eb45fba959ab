"""Every shipped launch configuration of the plain forward kernel, executed as PTX: with the pooled tail and the LSE, on
a whole block, half of one and 13 tokens of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.helpers import eager, make_layout, random_mask, random_qkv
from tests.kernels.triton.interpreter.test_forward import check
from tests.kernels.triton.interpreter.test_quantised import distance, oracles
from tests.kernels.triton.moved_columns import moved_columns
from vidaccel.blockmask import BlockMask
from vidaccel.kernels.triton import launch as launch_module
from vidaccel.kernels.triton.configs import Entry, choose, table
from vidaccel.kernels.triton.launch import launch
from vidaccel.types import PRECISIONS

REPRESENTATIVE = (80, 89, 90, 120)
PRECISION = {"int8": PRECISIONS["int8"], "int8-fp8": PRECISIONS["int8-fp8"], "fp8-fp8": PRECISIONS["fp8-tile"]}
DTYPE = {"native16": torch.bfloat16, "native32": torch.float32}
#: What sm_100 multiplies with (tcgen05) is not emulated.
ENTRIES = [entry for entry in table() if entry.arch != 100]


def representative(entry: Entry) -> bool:
    """Each precision on Hopper, where 128 rows have specialised warps, and the other tensor cores' generations."""
    rows = 128 if entry.arch == 90 else 64
    kinds = {80: ("native16", "native32", "int8"), 89: ("int8-fp8", "fp8-fp8"), 120: ("native16", "fp8-fp8")}
    wanted = entry.arch == 90 or entry.kind in kinds.get(entry.arch, ())
    return wanted and (entry.head_dim, entry.config.block_m) == (64, rows)


def run(entry: Entry) -> None:
    """As good as eager attention, or as the oracle in this precision; the tail costs no more than rounding it does."""
    rows = entry.config.block_m
    layout = make_layout((2, rows // 16, 12), (2, rows // 16, 8), text=13)
    mask = random_mask(layout, 1, [0.6])
    dtype = DTYPE.get(entry.kind, torch.bfloat16)
    tensors = random_qkv(layout, heads=1, dim=entry.head_dim, dtype=dtype)
    if entry.kind in DTYPE:
        check(layout, mask, tensors, entry.config, tail=True)
        return
    precision = PRECISION[entry.kind]
    out = launch(*tensors, layout, mask, precision=precision, tail=True, config=entry.config)
    (rounded, _), (exact, _) = oracles(tensors, precision, layout, mask, True)
    (dropped, _), (kept_only, _) = oracles(tensors, precision, layout, mask, False)
    assert distance(out, exact) <= distance(rounded, exact) + distance(dropped, kept_only)


@pytest.mark.parametrize(
    ("arch", "entry"),
    [
        pytest.param(
            entry.arch,
            entry,
            marks=[pytest.mark.representative] * representative(entry),
            id=f"{entry.arch}-{entry.kind}-{entry.head_dim}-{entry.config.block_m}x{entry.config.block_n}",
        )
        for entry in ENTRIES
    ],
)
def test_shipped_configuration(entry: Entry) -> None:
    run(entry)


@pytest.mark.representative
@pytest.mark.parametrize(("arch", "kind"), [(90, "native16"), (90, "int8-fp8")])
def test_columns_that_move_with_the_rows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that the interpreter and the machine code found right: garbage in the second consumer's rows."""
    monkeypatch.setattr(launch_module, "block_sparse_forward", moved_columns(tmp_path))
    layout = make_layout((2, 8, 8), (2, 8, 8))
    tensors = random_qkv(layout, heads=1, dim=64, dtype=torch.bfloat16)
    precision = PRECISION.get(kind, PRECISIONS["native"])
    out = launch(*tensors, layout, BlockMask.full(layout), precision=precision, config=choose(90, kind, 64, 128))
    exact = eager(*(x.double() for x in tensors), layout, BlockMask.full(layout))
    assert distance(out[:, :64], exact[:, :64]) < 0.1
    assert not distance(out[:, 64:], exact[:, 64:]) < 0.3
