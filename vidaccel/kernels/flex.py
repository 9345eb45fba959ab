"""Block-sparse attention by torch's own ``flex_attention``, which inductor compiles for the device at hand.

It is what runs where the Triton kernels cannot: with the Triton that older releases of torch bring along, on AMD and
Intel GPUs, and wherever a self-test of the others fails. FlexAttention knows blocks of one size, so the blocks of a
layout are padded to their largest::

    keys  = [block 0, padding | block 1, padding | ... | means of the blocks, padding]
    lists = kept blocks without padding (nothing to mask), and kept blocks with some, cut by a rule, or of means

With a tail every query block lists the means' blocks; the mask leaves out the means of what it keeps, and the score of
a mean gets the logarithm of its block's size.

On a CPU it needs a C++ compiler, computes no LSE and is slower than gathering, so it runs there only by name.
FlexAttention: https://arxiv.org/abs/2412.05496.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from ..axisrule import AxisRule
from ..blockmask import BlockMask, block_lists
from ..device import has_cpp_compiler
from ..errors import KernelError
from ..layout import TokenLayout
from ..pooling import block_means
from ..types import PRECISIONS, Precision
from .contract import AttentionResult, KernelRequest, Skips, check_inputs
from .gradient import forward_only

__all__ = ["block_sparse_attention", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cuda", "xpu", "cpu")
#: Block sizes are multiples of what the templates compute at once.
_UNIT = {"cpu": 16}
_UNIT_ELSEWHERE = 64
#: Shapes that one process compiles for. torch's own limit of 8 is soon reached by texts of different lengths.
_MOST_SHAPES = 256

_Mod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def why_not(request: KernelRequest) -> str | None:
    """Why FlexAttention cannot run the request, or ``None``."""
    if request.device not in _DEVICES:
        return f"torch compiles FlexAttention for {', '.join(_DEVICES)}, not for {request.device}"
    if request.precision.quantised:
        return f"computes in the input's dtype only; precision {request.precision.name!r} is quantised"
    if request.dtype not in _DTYPES:
        return f"{request.dtype} is not supported; valid are {', '.join(map(str, _DTYPES))}"
    if request.skip:
        return "takes its list of blocks as given, so it cannot skip blocks on the way"
    if request.head_dim < 16:
        return f"takes 16 channels a head or more, not {request.head_dim}"
    if request.device == "cpu":
        if request.return_lse:
            return "compiled for a CPU it gives no LSE"
        if not has_cpp_compiler():
            return "compiling it for a CPU needs a C++ compiler; install g++, or set CXX"
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
    compiled: bool = True,
) -> AttentionResult:
    """Attention of q over the key blocks that ``mask`` keeps; arguments as :class:`.contract.Kernel` has them.

    Args:
        compiled: ``False`` runs torch's uncompiled version, which holds every score in memory: for tests of what a CPU
            does not compile.

    Raises:
        LayoutError: if shapes and layout do not fit together.
        KernelError: if :func:`why_not` has a reason.
    """
    check_inputs(q, k, v, layout, mask)
    request = KernelRequest.of(q, precision, tail=tail, return_lse=return_lse and compiled, skip=skips is not None)
    reason = why_not(request)
    if reason:
        raise KernelError(f"FlexAttention cannot run this: {reason}")
    pads = _padding(layout, q.device, tail)
    keys, values = (_with_means(pads.pad(x), x, layout, pads) if tail else pads.pad(x) for x in (k, v))
    options: dict[str, Any] = {
        "block_mask": _mask(mask, layout, pads),
        "score_mod": _score(pads) if tail else None,
        "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    }
    if not return_lse:
        return pads.unpad(_flex(compiled)(pads.pad(q), keys, values, **options))
    out, lse = _with_lse(_flex(compiled), pads.pad(q), keys, values, options)
    return pads.unpad(out), lse if pads.place is None else lse.index_select(-1, pads.place)


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    run = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def limited(*tensors: Any, **options: Any) -> Any:
        # beyond the limit torch would run the uncompiled version; a whole graph is an error instead
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES, accumulated_recompile_limit=_MOST_SHAPES):
            return run(*tensors, **options)

    return limited


def _with_lse(flex: Callable[..., Any], q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The output and the LSE, as this release of torch names it."""
    try:
        from torch.nn.attention.flex_attention import AuxRequest
    except ImportError:  # before torch 2.9
        out, lse = flex(q, k, v, return_lse=True, **options)
        return out, lse
    out, found = flex(q, k, v, return_aux=AuxRequest(lse=True), **options)
    return out, found.lse


# -- blocks of one size -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Padding:
    """Where the tokens of a layout lie once its blocks have one size.

    Args:
        size: rows of a block.
        tokens: padded tokens, a multiple of ``size``; the means follow them.
        source: token of each padded place, int64 [tokens], 0 for padding; ``None`` if nothing is padded.
        place: padded place of each token, int64 [S]; ``None`` likewise.
        valid: which keys hold a token or a mean, bool [K].
        block: block of each key, int64 [K]; of a mean the one that it is of.
        is_token: whether a key is a token and not a mean, bool [K].
        bias: what is added to the score of each key, float32 [K].
    """

    size: int
    tokens: int
    source: torch.Tensor | None
    place: torch.Tensor | None
    valid: torch.Tensor
    block: torch.Tensor
    is_token: torch.Tensor
    bias: torch.Tensor

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[B,S,H,D] in layout order to [B,H,tokens,D]; without padding it is a view."""
        return (x if self.source is None else x.index_select(1, self.source)).transpose(1, 2)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        x = x.transpose(1, 2)
        return x if self.place is None else x.index_select(1, self.place)


@lru_cache(maxsize=16)
def _padding(layout: TokenLayout, device: torch.device, tail: bool) -> _Padding:
    sizes, blocks = layout.block_sizes.cpu(), layout.num_blocks
    unit = _UNIT.get(device.type, _UNIT_ELSEWHERE)
    size = math.ceil(int(sizes.max()) / unit) * unit
    inside = torch.arange(size) < sizes[:, None]
    source = place = None
    if not bool(inside.all()):
        source = torch.zeros(blocks, size, dtype=torch.int64)
        source[inside] = torch.arange(layout.tokens)
        source, place = source.flatten(), inside.flatten().nonzero().squeeze(-1)
    valid, block = inside.flatten(), torch.arange(blocks).repeat_interleave(size)
    bias = torch.zeros(len(valid))
    if tail:
        means = torch.arange(math.ceil(blocks / size) * size)
        valid, block = torch.cat([valid, means < blocks]), torch.cat([block, means.clamp(max=blocks - 1)])
        bias = torch.cat([bias, sizes.log()[means.clamp(max=blocks - 1)]])
    is_token = torch.arange(len(valid)) < blocks * size
    return _Padding(
        size,
        blocks * size,
        None if source is None else source.to(device),
        None if place is None else place.to(device),
        *(x.to(device) for x in (valid, block, is_token, bias.float())),
    )


def _with_means(padded: torch.Tensor, x: torch.Tensor, layout: TokenLayout, pads: _Padding) -> torch.Tensor:
    """Keys or values [B,H,K,D]: the padded tokens, then the means of the blocks of x [B,S,H,D]."""
    batch, _, heads, channels = x.shape
    means = block_means(x.transpose(1, 2).flatten(0, 1), layout).to(x.dtype).view(batch, heads, -1, channels)
    rest = len(pads.valid) - pads.tokens - means.shape[2]
    return torch.cat([padded, means, means.new_zeros(batch, heads, rest, channels)], dim=2)


# -- what it keeps ----------------------------------------------------------------------------------------------------


def _mask(mask: BlockMask, layout: TokenLayout, pads: _Padding) -> Any:
    """The lists, and the mask function of their blocks. It repeats the lists, because uncompiled FlexAttention reads
    nothing else."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    device, size = pads.valid.device, pads.size
    keep, cut = mask.dense.to(device), mask.partial.to(device)
    whole = pads.valid[: pads.tokens].view(-1, size).all(-1) & keep & ~cut
    masked = keep & ~whole
    extra = (len(pads.valid) - pads.tokens) // size
    if extra:
        masked = torch.cat([masked, masked.new_ones(*masked.shape[:3], extra)], dim=-1)
        whole = torch.cat([whole, whole.new_zeros(*whole.shape[:3], extra)], dim=-1)
    batch, heads = keep.shape[:2]
    valid, block, is_token = pads.valid, pads.block, pads.is_token

    def listed(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        kept = keep[b if batch > 1 else 0, h if heads > 1 else 0, row // size, block[column]]
        return (kept == is_token[column]) & valid[column]

    return FlexBlockMask.from_kv_blocks(
        *block_lists(masked),
        *block_lists(whole),
        BLOCK_SIZE=(size, size),
        mask_mod=listed if mask.rule is None else _ruled(listed, mask.rule, layout, pads),
        seq_lengths=(pads.tokens, len(pads.valid)),
    )


def _ruled(listed: _Mod, rule: AxisRule, layout: TokenLayout, pads: _Padding) -> _Mod:
    """The same within a rule over tokens. Whatever is no video token has a place behind all others, where all is
    kept."""
    device = pads.valid.device
    axes = [torch.nn.functional.pad(matrix, (0, 1, 0, 1), value=True).to(device) for matrix in rule.axes]
    coordinates = torch.tensor(tuple(layout.grid)).expand(len(pads.valid), 3).clone()
    of_tokens = torch.tensor(tuple(layout.grid)).expand(layout.tokens, 3).clone()
    of_tokens[layout.video_tokens] = layout.token_coords.cpu()
    coordinates[slice(layout.tokens) if pads.place is None else pads.place.cpu()] = of_tokens
    # inductor takes two views of one storage for one buffer, so each has its own
    (frames, rows, columns), (f, h, w) = axes, (axis.clone() for axis in coordinates.to(device).unbind(-1))
    several = rule.heads > 1

    def kept(b: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        one: Any = head if several else 0
        ruled = frames[one, f[q], f[k]] & rows[one, h[q], h[k]] & columns[one, w[q], w[k]]
        return listed(b, head, q, k) & ruled

    return kept


def _score(pads: _Padding) -> Callable[..., torch.Tensor]:
    bias = pads.bias

    def biased(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return score + bias[k]

    return biased
