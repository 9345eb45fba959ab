"""Other attention kernels to set ours beside, each behind the same small interface.

A peer says why it cannot run, gets its inputs in its own layout once (that is not timed, in its favour), and is then
called again and again. Dense ones know no mask. Nothing here is needed by vidaccel; what is not installed is a line
with its reason.

======================  ================================================================================
``cudnn-sdpa``          torch's SDPA held to cuDNN
``flash-sdpa``          torch's SDPA held to FlashAttention 2
``flex``                compiled FlexAttention with the same token mask, on its own blocks of 128
``sage``                SageAttention: int8 QK^T, dense (pip install sageattention)
``fastvideo``           FastVideo's block-sparse kernel with the same token mask in blocks of 64, padded
                        (pip install fastvideo-kernel)
======================  ================================================================================
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidaccel.blockmask import BlockMask
from vidaccel.layout import TokenLayout

__all__ = ["PEERS", "Bound", "FastVideo", "Flex", "Peer", "Sage", "Sdpa", "flex_lists", "padded_pieces"]

#: FlexAttention's own block, and FastVideo's.
FLEX_BLOCK, FASTVIDEO_BLOCK = 128, 64


@dataclass(frozen=True)
class Bound:
    """A peer with its inputs.

    Args:
        run: the call to time.
        rows: its result as [B,S,H,D] in layout order.
    """

    run: Callable[[], torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor]


class Peer(Protocol):
    """Another project's attention."""

    @property
    def name(self) -> str:
        """How results call it."""

    @property
    def sparse(self) -> bool:
        """Whether it takes a mask."""

    @property
    def tolerance(self) -> float:
        """Largest relative L2 error against exact attention on Gaussian inputs that its arithmetic explains."""

    def why_not(self, q: torch.Tensor) -> str | None:
        """Why it cannot run for this q [B,S,H,D], or ``None``."""

    def bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> Bound:
        """Its call on q, k, v [B,S,H,D] in layout order."""


_BF16 = 2 * torch.finfo(torch.bfloat16).eps


def _heads_first(bound: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Bound:
    inputs = tuple(x.transpose(1, 2).contiguous() for x in tensors)
    return Bound(lambda: bound(*inputs), lambda out: out.transpose(1, 2))


@dataclass(frozen=True)
class Sdpa:
    """``scaled_dot_product_attention`` held to one backend."""

    name: str
    backend: SDPBackend
    sparse: bool = False
    tolerance: float = _BF16

    def why_not(self, q: torch.Tensor) -> str | None:
        """Why it cannot run for this q, or ``None``."""
        return None if q.is_cuda else f"{self.name} runs on CUDA devices, not on {q.device.type}"

    def bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> Bound:
        """Dense attention; the mask is not looked at."""

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(self.backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return _heads_first(attention, q, k, v)


@dataclass(frozen=True)
class Flex:
    """Compiled FlexAttention with our token mask: whole blocks where it allows, partial ones at ragged edges."""

    name: str = "flex"
    sparse: bool = True
    tolerance: float = _BF16

    def why_not(self, q: torch.Tensor) -> str | None:
        """Why it cannot run for this q, or ``None``."""
        return None if q.is_cuda else "compiled flex_attention is measured on CUDA devices only"

    def bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> Bound:
        """Compiles for this shape; the mask function reads the block of each token."""
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        keep = mask.to(q.device).dense
        block = layout.block_of_token.to(device=q.device, dtype=torch.int32)
        many = keep.shape[1] > 1

        def keeps(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return keep[0, h if many else 0, block[i], block[j]]

        partial, full = flex_lists(keep, layout)
        flex_mask = FlexBlockMask.from_kv_blocks(
            partial.kv_num_blocks,
            partial.kv_indices,
            full.kv_num_blocks,
            full.kv_indices,
            BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK),
            mask_mod=keeps,
            seq_lengths=(layout.tokens, layout.tokens),
        )
        compiled = _compiled_flex()
        return _heads_first(lambda q, k, v: compiled(q, k, v, block_mask=flex_mask), q, k, v)


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    """One compiled function for all shapes; after the default limit of variants torch would run it uncompiled."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class _Lists:
    """Lists as FlexAttention has them; unlike ours a row may be empty."""

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor


def flex_lists(keep: torch.Tensor, layout: TokenLayout, size: int = FLEX_BLOCK) -> tuple[_Lists, _Lists]:
    """FlexAttention's partial and full blocks of ``size`` tokens for kept layout blocks bool [B,H,NB,NB]."""
    count = -(-layout.tokens // size)
    token = torch.arange(layout.tokens)
    shared = torch.zeros(count, layout.num_blocks)
    shared.index_put_((token // size, layout.block_of_token.cpu()), torch.ones(layout.tokens), accumulate=True)
    shared = shared.to(keep.device)
    lengths = shared.sum(-1)
    # float32 counts pairs exactly: at most size^2 of them
    pairs = torch.stack([shared @ head.float() @ shared.mT for head in keep.flatten(0, 1)]).unflatten(0, keep.shape[:2])
    whole = pairs == lengths[:, None] * lengths
    if layout.tokens % size:
        whole[..., -1] = False  # keys past the end must be masked
        whole[..., -1, :] = False
    return _listed((pairs > 0) & ~whole), _listed(whole)


def _listed(keep: torch.Tensor) -> _Lists:
    order = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return _Lists(keep.sum(-1, dtype=torch.int32), order)


@dataclass(frozen=True)
class Sage:
    """SageAttention as it comes: int8 QK^T with K smoothing, dense."""

    name: str = "sage"
    sparse: bool = False
    tolerance: float = 0.05

    def why_not(self, q: torch.Tensor) -> str | None:
        """Why it cannot run for this q, or ``None``."""
        if not q.is_cuda:
            return f"sageattention runs on CUDA devices, not on {q.device.type}"
        return _why_not_import("sageattention")

    def bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> Bound:
        """Its dense attention; the mask is not looked at."""
        sageattn = importlib.import_module("sageattention").sageattn
        return _heads_first(lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=False), q, k, v)


@dataclass(frozen=True)
class FastVideo:
    """FastVideo's block-sparse attention: each of our blocks becomes padded blocks of 64 tokens."""

    name: str = "fastvideo"
    sparse: bool = True
    tolerance: float = _BF16

    def why_not(self, q: torch.Tensor) -> str | None:
        """Why it cannot run for this q, or ``None``."""
        if not q.is_cuda:
            return f"fastvideo-kernel runs on CUDA devices, not on {q.device.type}"
        if q.shape[-1] not in (64, 128):
            return f"fastvideo-kernel has head dims 64 and 128, not {q.shape[-1]}"
        return _why_not_import("fastvideo_kernel")

    def bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, mask: BlockMask) -> Bound:
        """Pads and lists once; the timed call is the kernel alone."""
        attention = importlib.import_module("fastvideo_kernel").block_sparse_attn_from_indices
        place, block, lengths = padded_pieces(layout, FASTVIDEO_BLOCK)
        place, block = place.to(q.device), block.to(q.device)
        batch, _, heads, channels = q.shape

        def padded(x: torch.Tensor) -> torch.Tensor:
            room = x.new_zeros(batch, heads, len(lengths) * FASTVIDEO_BLOCK, channels)
            room[:, :, place] = x.transpose(1, 2)
            return room

        keep = mask.to(q.device).dense.expand(batch, heads, -1, -1)[:, :, block][..., block]
        lists = BlockMask.from_dense(keep)
        inputs = tuple(padded(x) for x in (q, k, v))
        sizes = lengths.to(device=q.device, dtype=torch.int32)
        return Bound(
            lambda: attention(*inputs, lists.kv_indices, lists.kv_num_blocks, sizes)[0],
            lambda out: out[:, :, place].transpose(1, 2),
        )


def padded_pieces(layout: TokenLayout, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layout's blocks cut into pieces of at most ``size`` tokens, each padded to ``size``.

    Returns:
        Padded position of each token [S], block of each piece [N] and tokens of each piece [N], int64 on the CPU.
    """
    counts = (layout.block_sizes + size - 1) // size
    block = torch.repeat_interleave(torch.arange(layout.num_blocks), counts)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(block)) - first[block]
    lengths = (layout.block_sizes[block] - rank * size).clamp(max=size)
    of_token = layout.block_of_token.cpu()
    within = torch.arange(layout.tokens) - layout.block_offsets[of_token]
    return first[of_token] * size + within, block, lengths


def _why_not_import(module: str) -> str | None:
    try:
        found: ModuleType = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{module} cannot be imported ({(str(error).splitlines() or [type(error).__name__])[0]})"
    del found
    return None


#: All of them, in the order of the tables.
PEERS: tuple[Peer, ...] = (
    Sdpa("cudnn-sdpa", SDPBackend.CUDNN_ATTENTION),
    Sdpa("flash-sdpa", SDPBackend.FLASH_ATTENTION),
    Flex(),
    Sage(),
    FastVideo(),
)
