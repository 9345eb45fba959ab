"""Which kernel serves a request of a session, and what takes its place once it has raised.

A kernel that raises is tried once for each request: the next one that can run it computes the same call, with the same
blocks, and after the last one the call runs dense. Each such call is counted with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import KernelError
from ..kernels.contract import AttentionResult, Kernel, KernelRequest
from ..kernels.dispatch import select
from ..kernels.failures import breaks_the_device, in_words, is_passing, is_recoverable
from ..types import PRECISIONS, Precision

if TYPE_CHECKING:
    from collections.abc import Callable

    from .runs import DenoisingRun

__all__ = ["Choice", "ChosenKernel", "KernelChoices", "NoKernelError"]

#: For each request, the kernels that raised and what they raised.
Failures = dict[KernelRequest, dict[str, str]]


class NoKernelError(Exception):
    """Every kernel that could run a call raised; the engine runs it dense."""


@dataclass(frozen=True)
class Choice:
    """What runs a request.

    Args:
        kernel: the kernel, or ``None`` for dense attention.
        precision: how it computes.
        reason: why that is not what the plan says, or ``None`` if it is.
    """

    kernel: Kernel | None
    precision: Precision
    reason: str | None = None


class KernelChoices:
    """The choices of one session.

    Args:
        prefer: name of the one kernel to use, or ``None`` for the best that can run.
    """

    def __init__(self, prefer: str | None = None) -> None:
        self.prefer = prefer
        self._lock = threading.Lock()
        self._choices: dict[KernelRequest, Choice] = {}
        self._failures: Failures = {}

    def of(self, request: KernelRequest, run: DenoisingRun) -> Choice:
        """What runs ``request`` now.

        Args:
            run: the denoising run that the call is in. What failed there for want of memory is tried again in the next.
        """
        with self._lock:
            if run.kernel_failures:
                failures = {key: dict(value) for key, value in self._failures.items()}
                for key, value in run.kernel_failures.items():
                    failures.setdefault(key, {}).update(value)
                return _choose(request, self.prefer, failures)
            if request not in self._choices:
                self._choices[request] = _choose(request, self.prefer, self._failures)
            return self._choices[request]

    def failed(self, request: KernelRequest, kernel: str, error: Exception, run: DenoisingRun) -> None:
        """Notes that ``kernel`` raised; it is not chosen for ``request`` again."""
        with self._lock:
            failures = run.kernel_failures if is_passing(error) else self._failures
            failures.setdefault(request, {})[kernel] = in_words(error)
            self._choices.clear()

    def exclude(self, request: KernelRequest, kernel: str, reason: str) -> None:
        """``kernel`` is not chosen for ``request`` in this session."""
        with self._lock:
            self._failures.setdefault(request, {})[kernel] = reason
            self._choices.clear()


def _choose(request: KernelRequest, prefer: str | None, failures: Mapping[KernelRequest, Mapping[str, str]]) -> Choice:
    """The best kernel that has not failed; in the model's own dtype where none computes the precision."""
    failed = failures.get(request, {})
    try:
        kernel = select(request, prefer=prefer, failed=failed)
        return Choice(kernel, request.precision, _in_place_of(failed, kernel) if failed else None)
    except KernelError as error:
        native = PRECISIONS["native"]
        if not request.precision.quantised:
            return Choice(None, native, str(error))
        other = _choose(request.with_precision(native), prefer, failures)
        lacking = f"precision {request.precision.name} ran in the model's own dtype: {error}"
        return Choice(other.kernel, native, lacking if other.reason is None else f"{lacking}; {other.reason}")


def _in_place_of(failed: Mapping[str, str], kernel: Kernel) -> str:
    told = "; ".join(f"kernel {name} failed ({reason})" for name, reason in failed.items())
    return f"{told}, {kernel.name} takes its place"


class ChosenKernel:
    """The kernel of one call: what :class:`KernelChoices` says, and the next one where that raises.

    Args:
        choices: of the session.
        request: what the call asks.
        run: the denoising run that it is in.
        fell_back: takes the reason, each time another kernel takes over.
    """

    def __init__(
        self, choices: KernelChoices, request: KernelRequest, run: DenoisingRun, fell_back: Callable[[str], None]
    ) -> None:
        self._choices, self._request, self._run, self._fell_back = choices, request, run, fell_back
        chosen = choices.of(request, run).kernel
        #: The kernel that runs, or has run.
        self.name = "dense" if chosen is None else chosen.name

    def __call__(self, *tensors: Any, **options: Any) -> AttentionResult:
        """Attention as :class:`..kernels.contract.Kernel` has it; the precision is that of the choice.

        Raises:
            NoKernelError: if every kernel raised.
            StrictError: in a strict session, if one did.
            KernelError: if one left the GPU unusable.
        """
        while True:
            choice = self._choices.of(self._request, self._run)
            if choice.kernel is None:
                raise NoKernelError
            self.name = choice.kernel.name
            try:
                return choice.kernel(*tensors, **{**options, "precision": choice.precision})
            except Exception as error:  # the compiler's, the driver's and the launcher's own kinds
                if breaks_the_device(error):
                    raise KernelError(
                        f"kernel {self.name} left the GPU unusable for this process ({in_words(error)}); start it again"
                        " with another kernel, such as patch(..., kernel='torch-sparse'), and please report it"
                    ) from error
                if not is_recoverable(error):
                    raise
                request = self._request.with_precision(choice.precision)
                self._choices.failed(request, self.name, error, self._run)
            reason = self._choices.of(self._request, self._run).reason
            assert reason is not None
            self._fell_back(reason)
