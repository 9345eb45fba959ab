"""Merging and clustering compiled for every architecture, at the shapes of a long video."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidaccel.kernels.triton import kmeans
from vidaccel.kernels.triton.gate import MachineCode, compile_for, problems
from vidaccel.kernels.triton.merge import merge_parts

ARCHES = [80, 86, 89, 90, 100, 120]
REPRESENTATIVE = pytest.mark.representative
#: One sequence of Wan's length, 75,600 tokens of 40 heads, and the 1000 key clusters of SVG2.
TOKENS, HEADS, CLUSTERS, D = 75_600, 40, 1000, 128
STRIDES = (TOKENS * HEADS * D, HEADS * D, D, 1)


def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


LSE = tensor(torch.float32, 1, HEADS, TOKENS)


def merging(arch: int, parts: int) -> MachineCode:
    rows = tensor(torch.bfloat16, 1, TOKENS, HEADS, D)

    def warmup() -> Any:
        return merge_parts.warmup(
            *((rows,) * parts, (LSE,) * parts, (STRIDES,) * parts, ((HEADS * TOKENS, TOKENS, 1),) * parts),
            *(rows, LSE, TOKENS, HEADS),
            D=D,
            BLOCK_D=D,
            ROWS=16,
            num_warps=4,
            grid=(1,),
        )

    return compile_for(arch, warmup)


def assignment(arch: int, dtype: torch.dtype, dim: int) -> MachineCode:
    def warmup() -> Any:
        return kmeans.nearest_centroid.warmup(
            tensor(dtype, 1, TOKENS, HEADS, dim),
            tensor(dtype, 1, HEADS, CLUSTERS, dim),
            tensor(torch.float32, 1, HEADS, CLUSTERS),
            tensor(torch.int32, 1, HEADS, TOKENS),
            *(TOKENS * HEADS * dim, HEADS * dim, dim, 1),
            *(TOKENS, HEADS, CLUSTERS),
            D=dim,
            FLOAT32_PRODUCT="tf32x3",
            **kmeans.assignment_sizes(dtype, dim),
            grid=(1,),
        )

    return compile_for(arch, warmup)


def averaging(arch: int) -> MachineCode:
    def warmup() -> Any:
        return kmeans.cluster_means.warmup(
            tensor(torch.bfloat16, 1, TOKENS, HEADS, D),
            *(tensor(torch.float32, 1, HEADS, CLUSTERS, D),) * 2,
            tensor(torch.int64, 1, HEADS, TOKENS),
            tensor(torch.int32, 1, HEADS, CLUSTERS + 1),
            *STRIDES,
            *(TOKENS, HEADS, CLUSTERS),
            D=D,
            BLOCK_D=D,
            ROWS=kmeans._ROWS,
            num_warps=4,
            grid=(1,),
        )

    return compile_for(arch, warmup)


@pytest.mark.parametrize(
    ("arch", "parts"), [*((arch, 2) for arch in ARCHES), pytest.param(90, 4, marks=REPRESENTATIVE)]
)
def test_merge(arch: int, parts: int) -> None:
    code = merging(arch, parts)
    assert problems(code) == []
    # 16 rows of 128 bf16 channels among 128 threads: two loads and two stores of 16 bytes for each part
    assert code.count(r"LDG\.E\.128") == 2 * parts
    assert code.count(r"STG\.E\.128") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize(
    ("arch", "dim"),
    [*((arch, D) for arch in ARCHES if arch != 90), pytest.param(90, D, marks=REPRESENTATIVE), (86, 64), (86, 256)],
)
def test_nearest_centroid(arch: int, dim: int, dtype: torch.dtype) -> None:
    code = assignment(arch, dtype, dim)
    assert problems(code, products=["bf16" if dtype == torch.bfloat16 else "tf32"]) == []


def test_too_many_channels_at_once_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why float32 takes few of them at a time."""
    sizes = kmeans.assignment_sizes(torch.float32, D)
    monkeypatch.setattr(kmeans, "assignment_sizes", lambda dtype, dim: {**sizes, "CHANNELS": D})
    assert any("spilled" in text for text in problems(assignment(80, torch.float32, D)))


@pytest.mark.parametrize("arch", [pytest.param(a, marks=REPRESENTATIVE) if a == 90 else a for a in ARCHES])
def test_cluster_means(arch: int) -> None:
    code = averaging(arch)
    assert problems(code) == []
    assert code.count(r"LDG\.E\.128") + code.count("LDGSTS"), "rows are read 16 bytes at a time"
