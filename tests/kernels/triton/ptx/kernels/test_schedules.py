"""Warps that run in any order, and copies and products that complete at any time: the same results, no false alarm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.helpers import make_layout
from tests.kernels.triton.ptx.emulator import Emulator, emulating
from tests.kernels.triton.ptx.kernels.test_mutations import KERNELS, execute, sound
from vidaccel.kernels.triton import hopper_launch, kmeans, launch, means, merge, rope
from vidaccel.kernels.triton.preparation import prepare, prepare_in_torch
from vidaccel.types import PRECISIONS

REPRESENTATIVE: tuple[int, ...] = ()
SEEDS = 20
LAYOUT = make_layout((3, 5, 6), (2, 4, 4))


@pytest.mark.parametrize(("arch", "name"), [(kernel[0], name) for name, kernel in KERNELS.items()])
def test_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launch, hopper_launch):
        monkeypatch.setattr(module, "prepare", prepare_in_torch)
    for seed in range(SEEDS):
        found = execute(name, lambda ptx: ptx, asynchronous="random", schedule="random", seed=seed)
        assert torch.equal(found.out, sound(name).out), f"seed {seed}"


def rows(heads: int = 1) -> torch.Tensor:
    return torch.randn(1, LAYOUT.tokens, heads, 32).bfloat16()


def quantised() -> list[torch.Tensor]:
    made = prepare(*(rows() for _ in range(3)), LAYOUT, PRECISIONS["int8-fp8"], tail=True)
    return [x for x in (made.q, made.k, made.v.view(torch.uint8), made.q_scale, made.k_scale) if x is not None]


def merged() -> list[torch.Tensor]:
    outs, lses = [rows() for _ in range(3)], [torch.randn(1, 1, LAYOUT.tokens) for _ in range(3)]
    return list(merge.merge_all(outs, lses))


def rotated() -> list[torch.Tensor]:
    angle = torch.randn(LAYOUT.tokens, 32)
    return list(rope.rotate_with_means(rows(2), LAYOUT, angle.cos(), angle.sin(), norm_weight=torch.randn(64)))


KINDS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "statistics": lambda: list(vars(means.block_statistics(rows(), LAYOUT)).values()),
    "quantised": quantised,
    "merged": merged,
    "rotated": rotated,
    "clusters": lambda: list(kmeans.cluster(rows(), 9, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [90])
def test_other_kernels(arch: int, kind: str) -> None:
    results = []
    for seed in range(SEEDS + 1):
        options = {"asynchronous": "random", "schedule": "random", "seed": seed} if seed else {}
        emulator = Emulator(arch=arch, **options)
        torch.manual_seed(0)
        with emulating(emulator):
            results.append(KINDS[kind]())
        assert emulator.errors == []
        assert all(torch.equal(one, other) for one, other in zip(results[0], results[-1], strict=True)), f"seed {seed}"
