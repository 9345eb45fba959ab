"""The self-tests of a plan's kernels, before they first run on a device.

A kernel is tested when the pipeline is patched, if it is on its GPU by then, and else when the first layer of the first
step attends: never in the middle of a video. On a CPU there is nothing to test, because what runs there is torch, which
this package's tests prove; ``vidaccel doctor --test`` does it all the same.
"""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING

import torch

from ..configs.plan import Plan
from ..errors import VidaccelWarning
from ..kernels.contract import KernelRequest
from ..kernels.selftest import check_kernel
from ..types import TileShape
from .prepare import request_of
from .runs import DenoisingRun

if TYPE_CHECKING:
    from .choice import KernelChoices

__all__ = ["Proofs", "requests_of"]


def requests_of(plan: Plan, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[KernelRequest, ...]:
    """What the plan asks of kernels for such q, k and v."""
    policies = dict.fromkeys(head for rule in plan.rules for head in rule.policy.heads if not head.is_dense)
    return tuple(dict.fromkeys(request_of(policy, device.type, dtype, head_dim) for policy in policies))


class Proofs:
    """What a session's kernels were tested for.

    Args:
        choices: of the session; a kernel that fails its test is not chosen.
    """

    def __init__(self, choices: KernelChoices) -> None:
        self._choices = choices
        self._done: set[tuple[torch.device, torch.dtype, int, TileShape]] = set()
        self._lock = threading.Lock()

    def prove(self, plan: Plan, device: torch.device, dtype: torch.dtype, head_dim: int, tile: TileShape) -> None:
        """Tests what would serve the plan for such q, k and v, unless that was done.

        Raises:
            KernelError: if a kernel left the device unusable.
        """
        key = (device, dtype, head_dim, tile)
        if key in self._done:
            return
        with self._lock:
            if key not in self._done:
                for request in requests_of(plan, device, dtype, head_dim):
                    self._prove(request, device, tile)
                self._done.add(key)

    def _prove(self, request: KernelRequest, device: torch.device, tile: TileShape) -> None:
        while True:
            choice = self._choices.of(request, DenoisingRun())
            kernel = choice.kernel
            if kernel is None or not (kernel.compiled or device.type != "cpu"):
                return
            served = request if choice.precision == request.precision else request.with_precision(choice.precision)
            found = check_kernel(kernel, served, device, tile).verdict
            if found.passed:
                return
            reason = f"its self-test on this device: {found}"
            warnings.warn(f"kernel {kernel.name} is not used: {reason}", VidaccelWarning, stacklevel=2)
            self._choices.exclude(served, kernel.name, reason)
