"""Catches output that would turn a video black: non-finite values, or a head that says the same for every token."""

from __future__ import annotations

import torch

__all__ = ["what_is_wrong"]

_SAMPLED_TOKENS = 64


def what_is_wrong(out: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why an attention output cannot be right, or ``None``.

    A flat head is only wrong when its values differ from token to token: attention over constant values is constant.

    Args:
        out: attention output [B, S, H, D].
        v: the values it was computed from, same shape.

    Returns:
        one phrase that names the first head concerned.
    """
    if not _is_suspicious(out):
        return None
    finite = torch.isfinite(out).all(dim=-1).all(dim=1)
    if not bool(finite.all()):
        batch, head = (~finite).nonzero()[0].tolist()
        return f"non-finite output in head {head} of batch entry {batch}"
    wrong = _flat(out) & ~_flat(v)
    if out.shape[1] > 1 and bool(wrong.any()):
        batch, head = wrong.nonzero()[0].tolist()
        return f"flat output in head {head} of batch entry {batch}"
    return None


def _is_suspicious(out: torch.Tensor) -> bool:
    """A cheap look with one wait for the device: one sum, which every NaN and Inf spoils, and a few tokens compared.

    It may cry wolf (sums of huge values overflow), but misses nothing.
    """
    spoiled = ~torch.isfinite(out.sum(dim=(1, 3), dtype=torch.float32))
    stride = max(1, out.shape[1] // _SAMPLED_TOKENS)
    return bool((spoiled | _flat(out[:, ::stride])).any())


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Heads whose tokens are all alike, bool [B, H]."""
    return (x == x[:, :1]).all(dim=-1).all(dim=1)
