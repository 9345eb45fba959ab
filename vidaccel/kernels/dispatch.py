"""Which kernel runs a request, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from ..blockmask import BlockMask
from ..errors import KernelError
from ..layout import TokenLayout
from ..types import PRECISIONS, Precision
from ..variablemask import VariableBlockMask
from . import emulated, flex, peers, reference, torch_sparse, triton, variable
from .contract import AttentionResult, Kernel, KernelRequest, Skips
from .selftest.machine import source_digest

__all__ = ["FunctionKernel", "kernels", "select", "why_not_table"]


_OWN_LAYOUT = "computes blocks of the layout only, not of variable size"


#: Device types that a request may name.
DEVICES = ("cpu", "cuda", "xpu", "mps")


@dataclass(frozen=True)
class FunctionKernel:
    """A kernel made of the two functions of its module.

    Args:
        name: how plans, reports and the ``kernel=`` argument call it.
        function: the module's ``block_sparse_attention``.
        reason: the module's ``why_not``.
        variable: what computes blocks of variable size, without a layout, or ``None`` if nothing does.
        compiled: whether its program is made on the machine it runs on.
        by_name: device types on which it runs only when it is asked for by name.
        packages: whose versions it depends on, besides torch's.
    """

    name: str
    function: Callable[..., AttentionResult]
    reason: Callable[[KernelRequest], str | None]
    variable: Callable[..., AttentionResult] | None = None
    compiled: bool = False
    by_name: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def identity(self) -> str:
        """Digest of the kernels' sources, and the versions of what compiles them."""
        return ", ".join([f"source {source_digest()}", *(f"{name} {_version(name)}" for name in self.packages)])

    def why_not(self, request: KernelRequest) -> str | None:
        """Why the kernel cannot run this request, or ``None`` if it can."""
        if request.variable and self.variable is None:
            return _OWN_LAYOUT
        if request.variable and (request.precision.quantised or request.skip):
            return "computes blocks of variable size in the inputs' dtype only, and without skipping"
        return self.reason(request)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        mask: BlockMask | VariableBlockMask,
        *,
        scale: float | None = None,
        precision: Precision = PRECISIONS["native"],
        tail: bool = False,
        return_lse: bool = False,
        skips: Skips | None = None,
    ) -> AttentionResult:
        """Attention of q over the blocks of k and v that ``mask`` keeps, as :class:`.contract.Kernel` has it."""
        options = {"scale": scale, "precision": precision, "tail": tail, "return_lse": return_lse, "skips": skips}
        if isinstance(mask, BlockMask):
            return self.function(q, k, v, layout, mask, **options)
        if self.variable is None:
            raise KernelError(f"{self.name} {_OWN_LAYOUT}")
        mask.check(layout)
        return self.variable(q, k, v, mask, **options)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # built from source under another name
        return "of unknown version"


#: In order of preference: one line registers a kernel.
_KERNELS: tuple[FunctionKernel, ...] = (
    FunctionKernel(
        "triton",
        triton.block_sparse_attention,
        triton.why_not,
        triton.variable_block_attention,
        compiled=True,
        packages=("triton",),
    ),
    FunctionKernel("flex", flex.block_sparse_attention, flex.why_not, compiled=True, by_name=("cpu",)),
    FunctionKernel(
        "torch-sparse", torch_sparse.block_sparse_attention, torch_sparse.why_not, variable.variable_block_attention
    ),
    # never faster than the two above: it takes what a plan asks of a CPU and they cannot compute
    FunctionKernel("emulated", emulated.block_sparse_attention, emulated.why_not),
    *(
        FunctionKernel(
            peer.NAME, peer.block_sparse_attention, peer.why_not, compiled=True, by_name=DEVICES,
            packages=peer.PACKAGES,
        )
        for peer in peers.modules()
    ),
)  # fmt: skip

#: Runs only when asked for by name: it is exact and far slower than dense.
_ORACLE: FunctionKernel = FunctionKernel(
    "reference", reference.block_sparse_attention, reference.why_not, variable.oracle
)


def kernels() -> tuple[FunctionKernel, ...]:
    """Every kernel, the preferred one first; the oracle comes last and is only run when asked for by name."""
    return (*_KERNELS, _ORACLE)


def why_not_table(request: KernelRequest) -> dict[str, str | None]:
    """For each kernel by name, why it cannot run the request, or ``None`` if it can."""
    return {kernel.name: kernel.why_not(request) for kernel in kernels()}


def select(request: KernelRequest, prefer: str | None = None, failed: Mapping[str, str] | None = None) -> Kernel:
    """The first kernel that can run the request.

    Args:
        prefer: the one kernel to use, by name, or ``None`` for the fastest.
        failed: kernels that were tried and raised, by name, and what they raised; they are passed over.

    Raises:
        KernelError: if ``prefer`` is not a kernel, or if no kernel can run the request; says each one's reason.
    """
    candidates = tuple(kernel for kernel in _KERNELS if request.device not in kernel.by_name)
    if prefer is not None:
        candidates = tuple(kernel for kernel in kernels() if kernel.name == prefer)
        if not candidates:
            valid = ", ".join(kernel.name for kernel in kernels())
            raise KernelError(f"there is no kernel {prefer!r}; valid are {valid}")
    reasons = []
    for kernel in candidates:
        failure = (failed or {}).get(kernel.name)
        reason = kernel.why_not(request) if failure is None else f"failed ({failure})"
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise KernelError(
        f"no kernel runs precision {request.precision.name!r} for {request.dtype} on {request.device}"
        f" ({'; '.join(reasons)})"
    )
