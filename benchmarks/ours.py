"""Our kernels as the GPU benchmarks call them.

``triton`` is what a caller gets; on Hopper that may be the Gluon kernel. ``triton-plain`` is always the kernel for
every device, so that both are checked and timed where both run.
"""

from __future__ import annotations

from typing import Any

import torch

from vidaccel.blockmask import BlockMask
from vidaccel.kernels import kernels
from vidaccel.kernels.contract import AttentionResult, Kernel
from vidaccel.kernels.dispatch import FunctionKernel
from vidaccel.kernels.triton import why_not
from vidaccel.layout import TokenLayout
from vidaccel.types import PRECISIONS, Precision

__all__ = ["PLAIN", "gluon_serves", "hopper", "kernel_of", "pieces_of", "settle_gluon"]

#: The kernel for every device, whatever the device.
PLAIN = "triton-plain"


def kernel_of(name: str) -> Kernel:
    """A kernel by name, :data:`PLAIN` among them."""
    if name == PLAIN:
        return FunctionKernel(PLAIN, _plain, why_not)
    return next(kernel for kernel in kernels() if kernel.name == name)


def hopper(device: torch.device) -> bool:
    """Whether a device has compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def gluon_serves(q: torch.Tensor, layout: TokenLayout, precision: Precision, *, skip: bool = False) -> bool:
    """Whether ``triton`` would take the Gluon kernel for q [B,S,H,D]; the first call may run its self-test."""
    if not q.is_cuda:
        return False
    from vidaccel.kernels.triton import hopper_launch

    return hopper_launch.why_not(q, layout, precision, skip=skip) is None


def settle_gluon(device: torch.device, seconds: float) -> str:
    """Has the Gluon kernel tested within some time, so that no later call waits longer for it; says what came of it."""
    if not hopper(device):
        return "no Hopper: the Gluon kernel does not run here"
    from vidaccel.kernels.triton import hopper_launch

    index = torch.cuda.current_device() if device.index is None else device.index
    found, made = hopper_launch.examined(index, seconds)
    when = "now" if made else "before"
    return f"the Gluon kernel passed its self-test {when}" if found.passed else f"no Gluon kernel: {found.reason}"


def pieces_of(name: str, q: torch.Tensor, layout: TokenLayout, precision: Precision) -> tuple[int, int] | None:
    """The sizes at which a skipping kernel decides, ``None`` for whole blocks."""
    if not name.startswith("triton"):
        return None
    from vidaccel.kernels.triton.tuned import config_for

    config = config_for(q, layout, precision, skip=True)
    return config.block_m, config.block_n


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    *,
    precision: Precision = PRECISIONS["native"],
    skips: Any = None,
    **options: Any,
) -> AttentionResult:
    from vidaccel.kernels.triton.launch import launch
    from vidaccel.kernels.triton.tuned import config_for

    config = config_for(q, layout, precision, skip=skips is not None)
    return launch(q, k, v, layout, mask, precision=precision, skips=skips, config=config, **options)
