"""Which kernel runs, and what is said when none can."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from tests.kernels.helpers import make_layout, random_mask, random_qkv
from tests.rounding import assert_rounded, rounding
from vidaccel.errors import KernelError
from vidaccel.kernels import emulated, flex, peers, reference, torch_sparse, triton
from vidaccel.kernels.contract import Kernel, KernelRequest
from vidaccel.kernels.dispatch import kernels, select, why_not_table
from vidaccel.types import PRECISIONS


def request(precision: str = "native", dtype: torch.dtype = torch.float32) -> KernelRequest:
    return KernelRequest("cpu", dtype, 64, PRECISIONS[precision])


def test_every_kernel_keeps_the_contract() -> None:
    wanted = list(inspect.signature(Kernel.__call__).parameters)[1:]
    for kernel in kernels():
        assert isinstance(kernel, Kernel)
    for module in (emulated, flex, reference, torch_sparse, triton):
        assert list(inspect.signature(module.block_sparse_attention).parameters)[: len(wanted)] == wanted


def test_the_preferred_kernel_comes_first_and_the_oracle_last() -> None:
    names = [kernel.name for kernel in kernels()]
    assert names[-1] == "reference" and len(set(names)) == len(names)
    assert names[:3] == ["triton", "flex", "torch-sparse"] and select(request()).name == "torch-sparse"


def test_the_oracle_runs_only_by_name() -> None:
    assert select(request("int8"), prefer="reference").name == "reference"
    with pytest.raises(
        KernelError,
        match=r"precision 'native' for torch.float64 on cpu \(triton: runs on CUDA .*; torch-sparse: torch.float64 is",
    ):
        select(request(dtype=torch.float64))


def test_few_bits_are_emulated_on_the_cpu_only_where_they_are_asked_for() -> None:
    for name, precision in PRECISIONS.items():
        assert select(request(name)).name == ("emulated" if precision.quantised else "torch-sparse")
        if precision.quantised:
            why = why_not_table(KernelRequest("cuda", torch.bfloat16, 64, precision))["emulated"]
            assert "on cuda it would only be slow" in str(why)
    assert "the model's own" in str(why_not_table(request())["emulated"])
    odd = KernelRequest("cpu", torch.float32, 15, PRECISIONS["int4-fp8-pairs"])
    assert "15 channels cannot be scaled by pairs" in str(emulated.why_not(odd))
    assert select(replace(request(), skip=True)).name == "emulated"
    assert "float64 is not supported" in str(emulated.why_not(replace(odd, dtype=torch.float64)))
    layout = make_layout()
    q, k, v = random_qkv(layout)
    with pytest.raises(KernelError, match="the emulation cannot run this: emulates few-bit arithmetic; precision 'nat"):
        emulated.block_sparse_attention(q, k, v, layout, random_mask(layout, 1, [0.3]))


def test_prefer_is_not_a_wish() -> None:
    """A kernel asked for by name is used or refused, never replaced by another one."""
    with pytest.raises(KernelError, match="quantised"):
        select(request("int8"), prefer="torch-sparse")
    with pytest.raises(KernelError, match="no kernel 'tritn'; valid are triton, flex, torch-sparse, emulated"):
        select(request(), prefer="tritn")


def test_why_not_table() -> None:
    table = why_not_table(request("int8"))
    assert table["reference"] is None and "quantised" in str(table["torch-sparse"])
    table = why_not_table(request())
    assert "runs on CUDA devices, not on cpu" in str(table.pop("triton"))
    assert "emulates" in str(table.pop("emulated"))
    for peer in peers.modules():
        assert "NVIDIA" in str(table.pop(peer.NAME))
    assert set(table.values()) == {None}


@pytest.mark.parametrize("name", ["torch-sparse", "reference"])
def test_kernels_pass_every_argument_on(name: str) -> None:
    layout = make_layout()
    q, k, v = random_qkv(layout)
    mask = random_mask(layout, 1, [0.3])
    kernel = select(KernelRequest.of(q, PRECISIONS["native"], tail=True, return_lse=True), prefer=name)
    out, lse = kernel(q, k, v, layout, mask, scale=0.2, tail=True, return_lse=True)
    want, want_lse = reference.block_sparse_attention(q, k, v, layout, mask, scale=0.2, tail=True, return_lse=True)
    allowed = rounding(q, k, v, 0.2)
    assert_rounded(out, want, allowed.out)
    assert_rounded(lse, want_lse, allowed.lse)
