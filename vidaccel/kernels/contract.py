"""The signature that every attention kernel shares, and what it may assume about its arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from ..blockmask import BlockMask
from ..errors import KernelError, LayoutError
from ..layout import TokenLayout
from ..types import Precision
from ..variablemask import VariableBlockMask

__all__ = ["AttentionResult", "Kernel", "KernelRequest", "Skips", "check_inputs", "check_tensors"]

#: What a kernel returns: the output, or with ``return_lse=True`` the output and its log-sum-exp.
AttentionResult = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Skips:
    """In-kernel skipping, and how often it happened.

    Walking a query block's list in ascending order, a key block is passed over when in none of the block's query rows
    its largest score comes within ``threshold`` of the largest score so far. Its exponentials, its V and its product
    are then spared, and it is missing from the output and from the LSE alike (BLASST; stage 2 of SpargeAttn).

    Kernels decide for their own tiles: blocks longer than a tile are decided about piece by piece. Of a partial block
    the kept scores decide, and its token pairs count whole.

    Args:
        threshold: float32 [H], natural-log units, BLASST's ln(lambda); -inf never skips.
        skipped: int64 [B,H], to which the kernel adds the token pairs that it passed over.
        pieces: most query rows and most keys that the reference decides about at once; ``None`` for whole blocks.
    """

    threshold: torch.Tensor
    skipped: torch.Tensor
    pieces: tuple[int, int] | None = None

    @staticmethod
    def of(threshold: torch.Tensor | float, q: torch.Tensor) -> Skips:
        """Skips for q [B,S,H,D] with one threshold, or one for each head, and the counts at zero.

        Raises:
            KernelError: if a threshold is positive or NaN, or their number is not that of the heads.
        """
        batch, _, heads, _ = q.shape
        limits = torch.as_tensor(threshold, dtype=torch.float32, device=q.device)
        if limits.dim() > 1 or limits.numel() not in (1, heads):
            raise KernelError(f"{limits.numel()} skip thresholds for {heads} heads; give one, or one for each head")
        if not bool((limits <= 0).all()):
            raise KernelError(f"a skip threshold is {limits.max()}; it is the logarithm of a share, so at most 0")
        counts = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
        return Skips(limits.reshape(-1).expand(heads).contiguous(), counts)


@dataclass(frozen=True)
class KernelRequest:
    """What a kernel needs to know to say whether it can run.

    Args:
        device: device type, as ``torch.device.type`` writes it ("cpu", "cuda", ...).
        dtype: dtype of q, k and v.
        head_dim: D, channels of one head.
        precision: how QK^T and PV are to be computed.
        tail: whether skipped blocks are to be summarised by the pooled tail.
        return_lse: whether the log-sum-exp is wanted.
        skip: whether key blocks may be passed over inside the kernel.
        variable: whether heads have blocks of their own (:class:`~vidaccel.variablemask.VariableBlockMask`).
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    precision: Precision
    tail: bool = False
    return_lse: bool = False
    skip: bool = False
    variable: bool = False

    @staticmethod
    def of(
        q: torch.Tensor,
        precision: Precision,
        *,
        tail: bool = False,
        return_lse: bool = False,
        skip: bool = False,
        variable: bool = False,
    ) -> KernelRequest:
        """The request that a call with this q [B,S,H,D] makes."""
        return KernelRequest(q.device.type, q.dtype, q.shape[-1], precision, tail, return_lse, skip, variable)

    def with_precision(self, precision: Precision) -> KernelRequest:
        """The same in another precision."""
        return replace(self, precision=precision)


@runtime_checkable
class Kernel(Protocol):
    """Block-sparse attention in one implementation.

    q, k and v are [B,S,H,D] in layout order, with any strides; ``mask`` broadcasts to [B,H,NB,NB], or has blocks of
    its own for every head, in whose order q, k and v then are. The output is
    [B,S,H,D] in q's dtype. The LSE is float32 [B,H,S]: the natural logarithm of the summed exponentials of the
    scaled scores, as they were before any smoothing; it counts the tail when ``tail=True``.

    ``scale`` multiplies q k^T and is 1/sqrt(D) by default. With ``tail=True`` each query also attends the means of
    the blocks it skips: logits ``scale * q.kmean_j + log n_j`` for a block of n_j tokens, values ``vmean_j``, one
    softmax over both. Blocks that ``skips`` passes over are gone; the tail does not stand in for them. Nor does it for
    the tokens of a partial block that the mask's rule drops: only blocks that are skipped whole are summarised.
    """

    @property
    def name(self) -> str:
        """How plans, reports and the ``kernel=`` argument call it."""

    @property
    def compiled(self) -> bool:
        """Whether its program is made on the machine that it runs on, so that no test elsewhere proves it."""

    def identity(self) -> str:
        """Changes whenever its results might: the digest of its source, and the versions of what compiles it."""

    def why_not(self, request: KernelRequest) -> str | None:
        """Why the kernel cannot run this request, or ``None`` if it can."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        mask: BlockMask | VariableBlockMask,
        *,
        scale: float | None = None,
        precision: Precision = ...,
        tail: bool = False,
        return_lse: bool = False,
        skips: Skips | None = None,
    ) -> AttentionResult:
        """Attention of q over the blocks of k and v that ``mask`` keeps."""


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> None:
    """Checks what every kernel assumes.

    Raises:
        LayoutError: if q, k and v are not three [B,S,H,D] tensors of one shape, if S is not the layout's length, or
            if the mask does not broadcast to [B,H,NB,NB].
        KernelError: if q, k and v differ in dtype or device.
    """
    check_tensors(q, k, v)
    batch, tokens, heads, _ = q.shape
    if tokens != layout.tokens:
        raise LayoutError(
            f"q has {tokens} tokens, but {layout!r} has {layout.tokens}; use the layout of this video's grid"
        )
    mask.check(layout)
    if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise LayoutError(
            f"a block mask of {mask.shape[0]}x{mask.shape[1]} (batch x heads) does not fit q of {batch}x{heads};"
            " each must be 1 or the same"
        )


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Checks what does not depend on blocks.

    Raises:
        LayoutError: if q, k and v are not three [B,S,H,D] tensors of one shape.
        KernelError: if they differ in dtype or device.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise LayoutError(
            f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; self-attention needs three"
            " [B,S,H,D] tensors of one shape"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise KernelError(
            f"q, k and v are {q.dtype} on {q.device}, {k.dtype} on {k.device} and {v.dtype} on {v.device}; convert"
            " them to one dtype and device"
        )
