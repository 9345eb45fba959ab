"""Other projects' kernels in torch, from their documentation, and as strict about their arguments.

They take the arguments by the published names, refuse what the real ones refuse, and read nothing of a padded key.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

__all__ = ["STAND_INS", "installed"]


def _attention(q: Any, k: Any, v: Any, keep: torch.Tensor, scale: float) -> torch.Tensor:
    """[B,H,S,D] with a boolean mask [B,H,S,S], in the inputs' dtype; rows of padding may keep nothing."""
    scores = (q.float() @ k.float().mT * scale).masked_fill(~keep, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights.to(q.dtype).float() @ v.float()).to(q.dtype)


def _kept(counts: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor, block: int) -> torch.Tensor:
    """Token pairs that the lists keep, padding keys left out; each list ascending, without repeats."""
    batch, heads, rows, width = index.shape
    keys = len(sizes)
    keep = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
    for place in range(width):
        used = counts > place
        chosen = index[..., place].long()
        assert bool((chosen[used] < keys).all()) and bool((chosen[used] >= 0).all()), "a block that is not there"
        assert not bool(keep.gather(-1, chosen[..., None])[..., 0][used].any()), "a block twice in one list"
        if place:
            assert bool((chosen > index[..., place - 1].long())[used].all()), "a list is not ascending"
        keep |= F.one_hot(chosen, keys).bool() & used[..., None]
    real = (torch.arange(block) < sizes[:, None]).flatten()
    return keep.repeat_interleave(block, -2).repeat_interleave(block, -1) & real


def _flashinfer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q2k_block_index: torch.Tensor,
    block_sparse_num: int,
    block_sizes: torch.Tensor | None = None,
    q2k_block_nums: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, None]:
    """``bsa_attn_sm100_blk64_fwd`` and ``bsa_attn_sm120_blk64_fwd``: [B,S,H,D], 64-token blocks, 128 channels."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape == k.shape == v.shape and q.shape[-1] == 128 and q.stride(-1) == 1 and not return_lse
    blocks = math.ceil(q.shape[1] / 64)
    assert q2k_block_index.dtype == torch.int32 and q2k_block_index.shape[:3] == (q.shape[0], q.shape[2], blocks)
    assert q2k_block_nums is not None and block_sizes is not None, "without both it would read padding"
    assert q2k_block_nums.dtype == torch.int32 and q2k_block_nums.shape == (q.shape[0], q.shape[2], blocks)
    assert block_sizes.dtype == torch.int32 and block_sizes.shape == (blocks,)
    assert softmax_scale is not None
    keep = _kept(q2k_block_nums, q2k_block_index, block_sizes, 64)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return _attention(*heads_first, keep, softmax_scale).transpose(1, 2), None


def _fastvideo(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q2k_idx: torch.Tensor,
    q2k_num: torch.Tensor,
    variable_block_sizes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``block_sparse_attn_from_indices``: [B,H,S,D], lengths in multiples of 64, its own scale."""
    assert q.shape == k.shape == v.shape and q.dtype == torch.bfloat16 and q.shape[-1] in (64, 128)
    assert q.shape[2] % 64 == 0 and variable_block_sizes.numel() == q.shape[2] // 64
    assert q2k_num.shape == q2k_idx.shape[:3] == (*q.shape[:2], q.shape[2] // 64)
    keep = _kept(q2k_num, q2k_idx, variable_block_sizes, 64)
    return _attention(q, k, v, keep, q.shape[-1] ** -0.5), torch.full(q.shape[:3], math.nan)


class BlockSparseTensorsTorch(NamedTuple):
    """As FlashAttention-4 has it."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    mask_mod: Any = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, None]:
    """``flash_attn.cute.flash_attn_func``: [B,S,H,D]; without a mask function only whole blocks mean anything."""
    assert block_sparse_tensors is not None and mask_mod is None and not return_lse
    tensors = block_sparse_tensors
    assert tensors.full_block_cnt is not None and tensors.full_block_idx is not None
    assert tensors.block_size == (128, 128) and q.shape[1] % 128 == 0, "the rest of a block would be read"
    assert not tensors.mask_block_cnt.any(), "partial blocks need a mask function"
    rows = q.shape[1] // 128
    for x in (tensors.mask_block_cnt, tensors.full_block_cnt):
        assert x.dtype == torch.int32 and x.shape[-1] == rows
        assert x.shape[0] in (1, q.shape[0]) and x.shape[1] in (1, q.shape[2])
    keep = _kept(tensors.full_block_cnt, tensors.full_block_idx, torch.full((rows,), 128), 128)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _attention(*(x.transpose(1, 2) for x in (q, k, v)), keep, scale).transpose(1, 2), None


#: Modules of each project by full name, and what they hold.
STAND_INS: dict[str, dict[str, dict[str, Callable[..., Any]]]] = {
    "flashinfer": {
        "flashinfer.cute_dsl.sparse.bsa_attn_sm100_blk64": {"bsa_attn_sm100_blk64_fwd": _flashinfer},
        "flashinfer.cute_dsl.sparse.bsa_attn_sm120": {"bsa_attn_sm120_blk64_fwd": _flashinfer},
    },
    "fastvideo": {"fastvideo_kernel": {"block_sparse_attn_from_indices": _fastvideo}},
    "flash-attention-4": {
        "flash_attn.cute": {"flash_attn_func": _flash_attention},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
    },
}


@contextmanager
def installed(name: str, monkeypatch: Any) -> Iterator[None]:
    """The project's stand-in in ``sys.modules``, with its parents."""
    for path, content in STAND_INS[name].items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                module = ModuleType(parent)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, parent, module)
        for attribute, value in content.items():
            monkeypatch.setattr(sys.modules[path], attribute, value, raising=False)
    yield
