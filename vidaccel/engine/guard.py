"""Catches output that would turn a video black: non-finite values, or a head that says the same for every token."""

from __future__ import annotations

import torch

__all__ = ["what_is_wrong"]


def what_is_wrong(out: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why an attention output cannot be right, or ``None``.

    A flat head is only wrong when its values differ from token to token: attention over constant values is constant.

    Args:
        out: attention output [B, S, H, D].
        v: the values it was computed from, same shape.

    Returns:
        one phrase that names the first head concerned.
    """
    finite = torch.isfinite(out).all(dim=-1).all(dim=1)
    if not bool(finite.all()):
        batch, head = (~finite).nonzero()[0].tolist()
        return f"non-finite output in head {head} of batch entry {batch}"
    if out.shape[1] > 1:
        flat = (out == out[:, :1]).all(dim=-1).all(dim=1)
        if bool(flat.any()):
            varied = (v != v[:, :1]).any(dim=-1).any(dim=1)
            wrong = flat & varied
            if bool(wrong.any()):
                batch, head = wrong.nonzero()[0].tolist()
                return f"flat output in head {head} of batch entry {batch}"
    return None
