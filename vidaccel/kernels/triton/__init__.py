"""Block-sparse and quantised attention in Triton, for CUDA devices from sm_80 on.

This module is the door: importing it needs no Triton; the kernels are imported at first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch

from ...blockmask import BlockMask
from ...errors import KernelError
from ...layout import TokenLayout
from ...types import PRECISIONS, Precision
from ...variablemask import VariableBlockMask
from ..contract import AttentionResult, KernelRequest, Skips
from ..gradient import forward_only

__all__ = ["block_sparse_attention", "variable_block_attention", "why_not"]

#: Oldest Triton with everything the kernels use, and what torch 2.10 and later bring along.
OLDEST = (3, 6)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(request: KernelRequest) -> str | None:
    """Why the Triton kernels cannot run the request, or ``None``."""
    if request.device != "cuda":
        return f"runs on CUDA devices, not on {request.device}"
    missing = _missing()
    if missing:
        return missing
    if request.dtype not in _DTYPES:
        return f"{request.dtype} is not supported; valid are {', '.join(map(str, _DTYPES))}"
    if torch.version.hip is not None:
        return "has never run on an AMD GPU"
    capability = torch.cuda.get_device_capability()
    lacking = lacks(capability, request.precision) or (cannot_skip(capability, request) if request.skip else None)
    if lacking:
        return lacking
    from .configs import arch_of, choose, kind_of

    try:
        choose(arch_of(torch.device("cuda")), kind_of(request.dtype, request.precision), request.head_dim, 1)
    except KernelError as error:
        return str(error)
    return None


def lacks(capability: tuple[int, int], precision: Precision) -> str | None:
    """What a CUDA device of this compute capability lacks for a precision, or ``None``."""
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"{name} has no bf16 tensor cores; needs 8.0 or later"
    if "nvfp4" in (precision.qk, precision.pv) and capability < (10, 0):
        return f"{name} cannot multiply 4-bit floats; precision {precision.name!r} needs 10.0 or later"
    if precision.emulated:
        return f"no Triton kernel here computes precision {precision.name!r}; it is emulated on the CPU only"
    if "fp8" in (precision.qk, precision.pv) and capability < (8, 9):
        return f"{name} cannot multiply fp8; precision {precision.name!r} needs 8.9 or later"
    return None


def cannot_skip(capability: tuple[int, int], request: KernelRequest) -> str | None:
    """Why in-kernel skipping has no launch configuration that passed the gate, or ``None``."""
    if capability[0] == 10:
        return "in-kernel skipping: Triton 3.6 cannot compile it for compute capability 10"
    if request.head_dim > 128:
        return f"in-kernel skipping takes at most 128 channels a head, not {request.head_dim}; registers spill beyond"
    if capability >= (12, 0) and request.dtype == torch.float32:
        return "in-kernel skipping in float32 spills registers on compute capability 12; use a 16-bit dtype"
    return None


@cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} is too old; install {OLDEST[0]}.{OLDEST[1]} or later"
    return None


@forward_only
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    *,
    scale: float | None = None,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
    return_lse: bool = False,
    skips: Skips | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; arguments as :class:`..contract.Kernel` has them.

    Raises:
        LayoutError: if shapes and layout do not fit together.
        KernelError: if :func:`why_not` has a reason, or ``scale`` is not positive.
    """
    with _ready(q, k, v, precision=precision, tail=tail, return_lse=return_lse, skip=skips is not None):
        from .launch import launch

        return launch(
            q, k, v, layout, mask, scale=scale, precision=precision, tail=tail, return_lse=return_lse, skips=skips
        )


@forward_only
def variable_block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: VariableBlockMask,
    *,
    scale: float | None = None,
    precision: Precision = PRECISIONS["native"],
    tail: bool = False,
    return_lse: bool = False,
    skips: Skips | None = None,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps, as :func:`..variable.variable_block_attention` has it.

    Raises:
        LayoutError: if shapes and mask do not fit together.
        KernelError: if :func:`why_not` has a reason, ``scale`` is not positive, for a quantised precision, or skips.
    """
    with _ready(q, k, v, precision=precision, tail=tail, return_lse=return_lse, skip=skips is not None):
        from .variable import launch

        return launch(q, k, v, mask, scale=scale, precision=precision, tail=tail, return_lse=return_lse, skips=skips)


@contextmanager
def _ready(*tensors: torch.Tensor, precision: Precision, **options: bool) -> Iterator[None]:
    """On the device of q, k and v, which these kernels can use.

    Raises:
        KernelError: if they cannot.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise KernelError("the Triton kernel has no backward pass; use torch.no_grad() or kernel torch-sparse")
    q = tensors[0]
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        reason = why_not(KernelRequest.of(q, precision, **options))
        if reason:
            raise KernelError(f"the Triton kernel cannot run this: {reason}")
        yield
