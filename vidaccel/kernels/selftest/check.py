"""Tests the kernel that is about to serve a plan's calls on a device, once, and says so in one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...blockmask import BlockMask
from ...errors import KernelError, VidaccelError
from ...layout import TokenLayout
from ...types import Precision, TileShape
from ...variablemask import VariableBlockMask
from ..contract import Kernel, KernelRequest, Skips
from ..failures import breaks_the_device, in_words, is_passing
from .cases import cases_of
from .examine import examine
from .machine import machine
from .verdicts import Verdict, verdict

__all__ = ["Tested", "check_kernel", "on_screen"]


@dataclass(frozen=True)
class Tested:
    """A verdict, and what it took.

    Args:
        verdict: on the kernel.
        fresh: whether it was tested now, and not before on this machine.
        seconds: of the test, compilation included; 0 if it is not fresh.
    """

    verdict: Verdict
    fresh: bool
    seconds: float


def on_screen(text: str, end: str = "\n") -> None:
    """Writes to the standard error, where progress goes, if there is one."""
    if sys.stderr is not None:
        print(text, end=end, file=sys.stderr, flush=True)


def check_kernel(
    kernel: Kernel,
    request: KernelRequest,
    device: torch.device,
    tile: TileShape,
    say: Callable[[str, str], None] = on_screen,
) -> Tested:
    """Tests ``kernel`` with calls as ``request`` has them on blocks as large as ``tile``, unless that was done before.

    Args:
        say: takes the line that is shown, in two pieces with how each ends; nothing is said of what is known.

    Raises:
        KernelError: if the kernel left the device unusable.
    """
    told = {**machine(device), "kernel": kernel.identity(), "call": f"{request} in blocks of {tile}"}
    start = time.perf_counter()

    def test() -> Verdict:
        dtype = str(request.dtype).removeprefix("torch.")
        say(
            f"vidaccel: testing kernel {kernel.name} on {told['device']} ({dtype}, {request.precision.name},"
            f" {request.head_dim} channels, blocks of {tile.tokens})"
            + (", the first time with compilation ... " if kernel.compiled else " ... "),
            "",
        )
        made = _test(kernel, request, device, tile)
        say(f"{made} ({time.perf_counter() - start:.1f} s)", "\n")
        return made

    found, fresh = verdict(kernel.name, told, test)
    return Tested(found, fresh, time.perf_counter() - start if fresh else 0.0)


def _test(kernel: Kernel, request: KernelRequest, device: torch.device, tile: TileShape) -> Verdict:
    # a kernel that gives no LSE serves only what asks for none
    with_lse = kernel.why_not(replace(request, return_lse=True)) is None

    def fill(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        mask: BlockMask,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        precision: Precision,
        tail: bool,
    ) -> None:
        blocks = _variable(mask, layout) if request.variable else mask
        skips = Skips.of(float("-inf"), q) if request.skip else None  # a limit that nothing falls below
        options: dict[str, Any] = {"precision": precision, "tail": tail, "return_lse": with_lse, "skips": skips}
        made = kernel(q, k, v, layout, blocks, **options)
        if isinstance(made, tuple):
            made, made_lse = made
            lse.copy_(made_lse)
        out.copy_(made)

    try:
        with torch.no_grad():
            return examine(fill, device, cases_of(request, tile), with_lse=with_lse)
    except Exception as error:  # the compiler's, the driver's and the launcher's own kinds
        if breaks_the_device(error):
            raise KernelError(
                f"the self-test of kernel {kernel.name} left the GPU unusable for this process ({in_words(error)});"
                " start it again with another kernel, such as patch(..., kernel='torch-sparse'), and please report it"
            ) from error
        if isinstance(error, VidaccelError) and not isinstance(error, KernelError):
            raise
        return Verdict("untested", in_words(error) if is_passing(error) else f"it raised ({in_words(error)})")


def _variable(mask: BlockMask, layout: TokenLayout) -> VariableBlockMask:
    """The same blocks, given as ones of variable size."""
    keep = mask.dense
    sizes = layout.block_sizes.to(keep.device).expand(*keep.shape[:3]).contiguous()
    return VariableBlockMask(keep, sizes, sizes)
