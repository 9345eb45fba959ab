"""The table of launch configurations: complete for what devices can run, and chosen by block size."""

from __future__ import annotations

import pytest
import torch

from vidaccel.errors import KernelError
from vidaccel.kernels.contract import KernelRequest
from vidaccel.kernels.triton import cannot_skip, lacks
from vidaccel.kernels.triton.configs import Config, arch_of, choose, kind_of, table
from vidaccel.types import KERNEL_PRECISIONS, PRECISIONS, Precision

ARCHS = (80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", KERNEL_PRECISIONS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("head_dim", [20, 64, 96, 128])
def test_whatever_a_device_can_multiply_has_a_configuration(arch: int, precision: Precision, head_dim: int) -> None:
    kind = kind_of(torch.bfloat16, precision)
    if lacks(divmod(arch, 10), precision):
        assert not [entry for entry in table() if entry.arch == arch and entry.kind == kind]
    else:
        assert choose(arch, kind, head_dim, 128).block_m in (64, 128)
        assert choose(arch, kind, head_dim, 64).block_m == 64


def test_bf16_goes_up_to_256_channels() -> None:
    for arch in ARCHS:
        assert choose(arch, "native16", 256, 128)


def test_long_blocks_get_the_largest_tile() -> None:
    assert choose(90, "native16", 128, 384) == choose(90, "native16", 128, 128) == Config(128, 128, 4, 2, True)


def test_entries_are_sound() -> None:
    seen = [(e.arch, e.kind, e.head_dim, e.config.block_m) for e in table()]
    assert len(set(seen)) == len(seen)
    for entry in table():
        assert entry.origin in ("gate", "measured")
        # only Hopper's 128 rows can be split over two consumers
        assert entry.config.warp_specialize is False or (entry.arch, entry.config.block_m) == (90, 128)
        sizes = (entry.config.block_m, entry.config.block_n, entry.config.warps)
        assert all(size & (size - 1) == 0 for size in sizes)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(KernelError, match="sm_90 has configurations for native32 with head dims at most 64, not 128"):
        choose(90, "native32", 128, 64)
    with pytest.raises(KernelError, match="for fp8-fp8 with head dims of no size, not 64"):
        choose(80, "fp8-fp8", 64, 64)


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), 80), ((8, 7), 86), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120), ((13, 0), 120)]
)
def test_an_unknown_device_uses_the_nearest_older_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arch_of(torch.device("cuda", 0)) == arch


@pytest.mark.parametrize(
    ("capability", "name", "reason"),
    [
        ((7, 5), "native", "no bf16 tensor cores"),
        ((8, 6), "int8", None),
        ((8, 6), "int8-fp8", "cannot multiply fp8"),
        ((8, 9), "fp8-tile", None),
        ((9, 0), "nvfp4", "9.0 cannot multiply 4-bit floats"),
        ((12, 0), "nvfp4", "no Triton kernel here computes precision 'nvfp4'"),
        ((9, 0), "int4-fp8", "no Triton kernel here"),
        ((9, 0), "int8-fp8-acc16", "no Triton kernel here"),
    ],
)
def test_what_a_device_lacks(capability: tuple[int, int], name: str, reason: str | None) -> None:
    found = lacks(capability, PRECISIONS[name])
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((9, 0), torch.bfloat16, 128, None),
        ((10, 0), torch.bfloat16, 128, "cannot compile it"),
        ((9, 0), torch.bfloat16, 256, "at most 128 channels"),
        ((12, 0), torch.float32, 64, "float32 spills"),
    ],
)
def test_skipping_runs_only_where_it_passed_the_gate(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, reason: str | None
) -> None:
    request = KernelRequest("cuda", dtype, head_dim, PRECISIONS["native"], skip=True)
    found = cannot_skip(capability, request)
    assert found is None if reason is None else found is not None and reason in found
