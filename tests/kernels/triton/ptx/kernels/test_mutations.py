"""Faults put into compiled programs are noticed: by a fault of the emulator, a deadlock or a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from tests.kernels.helpers import eager, make_layout, random_qkv
from tests.kernels.triton.ptx.emulator import Emulator, Fault, emulating
from tests.kernels.triton.ptx.kernels.mutations import MUTATIONS, PROGRAMS, Mutation, mutants
from vidaccel.blockmask import BlockMask
from vidaccel.kernels.triton import hopper_launch, launch
from vidaccel.kernels.triton.configs import Config
from vidaccel.kernels.triton.preparation import prepare_in_torch
from vidaccel.types import PRECISIONS

REPRESENTATIVE = (80, 89, 90)
SPECIALISED = Config(128, 128, 4, 2, warp_specialize=True)
#: Architecture, precision and configuration of each program; the Gluon kernel has its own.
KERNELS: dict[str, tuple[int, str, Config | None]] = {
    "hopper-bf16": (90, "native", None),
    "hopper-fp8": (90, "fp8-tile", None),
    "warps-bf16": (90, "native", SPECIALISED),
    "warps-int8-fp8": (90, "int8-fp8", SPECIALISED),
    "wgmma-bf16": (90, "native", Config(64, 64, 4, 2)),
    "mma-bf16": (80, "native", Config(64, 64, 4, 3)),
    "mma-fp8": (89, "fp8-tile", Config(64, 64, 4, 3)),
}


@dataclass(frozen=True)
class Execution:
    """The first query piece of a program, which walks four key pieces.

    Args:
        out: the piece.
        rest: the other rows, which nobody computes.
        error: the largest of the piece's values.
        faults: all that the emulator found, advice among them.
        ptx: the program.
    """

    out: torch.Tensor
    rest: torch.Tensor
    error: float
    faults: int
    ptx: str


def execute(name: str, edit: Callable[[str], str], **schedule: Any) -> Execution:
    """One run of a program of :data:`KERNELS`; raises a fault that is not advice.

    Args:
        schedule: ``asynchronous``, ``schedule`` and ``seed`` of the emulator.
    """
    arch, precision, config = KERNELS[name]
    rows = (config or hopper_launch.CONFIG).block_m
    torch.manual_seed(0)
    layout = make_layout((rows // 16, 4, 16), (rows // 16, 4, 4))
    q, k, v = random_qkv(layout, heads=1, dim=64, dtype=torch.bfloat16)
    mask, how = BlockMask.full(layout), PRECISIONS[precision]
    programs = []

    def edited(ptx: str) -> str:
        programs.append(ptx)
        return edit(ptx)

    # in Gluon fences are written by hand; those that Triton leaves out are its own affair
    proxies = "error" if config is None else "advice"
    emulator = Emulator(arch=arch, edit=edited, proxies=proxies, only=lambda x, y, z: x == 0, **schedule)
    with emulating(emulator):
        if config is None:
            out, lse = torch.empty_like(q), torch.empty(1, 1, layout.tokens)
            hopper_launch.attend_into(q, k, v, layout, mask, out, lse, precision=how, tail=False)
        else:
            out = launch.launch(q, k, v, layout, mask, precision=how, config=config)
    if emulator.errors:
        raise emulator.errors[0]
    exact = eager(*(x.double() for x in (q, k, v)), layout, mask)
    error = float((out.double() - exact)[:, :rows].abs().max())
    (ptx,) = programs
    return Execution(out[:, :rows], out[:, rows:], error, len(emulator.faults), ptx)


@cache
def sound(name: str) -> Execution:
    """The program as it is."""
    result = execute(name, lambda ptx: ptx)
    assert result.out.isfinite().all() and result.rest.isnan().all()
    return result


def noticed(name: str, ptx: str) -> bool:
    """Whether anything shows that this is not the sound program."""
    try:
        result = execute(name, lambda _: ptx)
    except Fault:
        return True
    as_right = result.error <= 2 * sound(name).error and bool(result.rest.isnan().all())
    return result.faults > sound(name).faults or not as_right


@pytest.mark.parametrize(
    ("arch", "name", "mutation"),
    [
        pytest.param(KERNELS[name][0], name, mutation, id=f"{name}-{mutation.name}")
        for name in PROGRAMS
        for mutation in MUTATIONS
        if name in mutation.programs
    ],
)
def test_it_is_noticed(
    name: str, mutation: Mutation, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for module in (launch, hopper_launch):  # one launch a run
        monkeypatch.setattr(module, "prepare", prepare_in_torch)
    programs = list(mutants(mutation, sound(name).ptx))
    assert programs, "nothing in the program is like this"
    assert [at for at, ptx in enumerate(programs) if not noticed(name, ptx)] == []
    request.node.user_properties.append(("mutants", len(programs)))


@pytest.mark.representative
@pytest.mark.parametrize(("arch", "name"), [(kernel[0], name) for name, kernel in KERNELS.items()])
def test_the_sound_program_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launch, hopper_launch):
        monkeypatch.setattr(module, "prepare", prepare_in_torch)
    result = sound(name)
    assert result.error < 0.1
