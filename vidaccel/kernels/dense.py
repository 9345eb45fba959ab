"""Dense attention that returns its log-sum-exp, by the fastest way each device has."""

from __future__ import annotations

import torch

from .gradient import without_gradient

__all__ = ["attention_with_lse", "explicit_attention"]

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Most scores that the explicit softmax holds at once; longer queries are cut.
_MAX_SCORES = 1 << 24


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v, and the LSE of each row.

    Args:
        q: [N,H,Lq,D], any strides.
        k, v: [N,H,Lk,D].
        scale: multiplies q k^T.

    Returns:
        The output [N,H,Lq,D] in q's dtype and the natural-log LSE, float32 (float64 for float64) [N,H,Lq]. The LSE has
        no gradient, because those of torch's kernels carry none: what is merged by it would have a wrong one.
    """
    if q.device.type == "cpu" and q.dtype in _CPU_DTYPES:
        out, lse = _cpu_flash(q, k, v, scale)
    elif q.device.type == "cuda" and q.dtype in (*_FLASH_DTYPES, torch.float32):
        out, lse = _cuda(q, k, v, scale)
    else:
        out, lse = explicit_attention(q, k, v, scale)
    return out, without_gradient(lse, q, k)


def _cpu_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    # the kernel reads rows of D adjacent channels, with any stride between rows
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out, lse


def _cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    d, length = q.shape[-1], q.shape[-2]
    if d % 8:  # both kernels load 16 bytes at a time
        q, k, v = (torch.nn.functional.pad(x, (0, 8 - d % 8)) for x in (q, k, v))
    capable = torch.cuda.get_device_capability(q.device) >= (8, 0)
    if capable and q.dtype in _FLASH_DTYPES and q.shape[-1] <= 256:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    return out[..., :d], lse[..., :length]


def explicit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by two matrix products and a float32 softmax, a few rows at a time: for devices without a kernel."""
    n, h, length, _ = q.shape
    out = torch.empty(n, h, length, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(n, h, length, dtype=torch.float32, device=q.device)
    keys, values = k.float().transpose(-1, -2), v.float()
    step = max(1, _MAX_SCORES // max(1, n * h * k.shape[-2]))
    for start in range(0, length, step):
        rows = slice(start, start + step)
        scores = (q[:, :, rows].float() * scale) @ keys
        row_lse = scores.logsumexp(-1, keepdim=True)
        out[:, :, rows] = ((scores - row_lse).exp() @ values).to(q.dtype)
        lse[:, :, rows] = row_lse.squeeze(-1)
    return out, lse
