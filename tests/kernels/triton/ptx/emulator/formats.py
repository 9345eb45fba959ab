# ruff: noqa
"""Number formats, as bits."""

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64


def to_bf16(x):
    """float32 -> bits, nearest even."""
    b = x.view(u4)
    r = ((b + u4(0x7FFF) + ((b >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    nan = x != x
    return np.where(nan, u2(0x7FFF), r) if nan.any() else r


def from_bf16(b):
    return (b.astype(u4) << u4(16)).view(f4)


def _table_e4m3():
    out = np.zeros(256, f4)
    for b in range(256):
        e, m = b >> 3 & 15, b & 7
        v = float("nan") if (b & 127) == 127 else (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        out[b] = -v if b & 128 else v
    return out


def _table_e5m2():
    return (np.arange(256, dtype=u2) << u2(8)).view(f2).astype(f4)


E4M3, E5M2 = _table_e4m3(), _table_e5m2()
_POS = E4M3[:127].astype(f8)  # 0 .. 448
_MID = (_POS[1:] + _POS[:-1]) / 2


def to_e4m3(x):
    """float32 -> bits, nearest even, finite values beyond 448 saturate."""
    a = np.abs(x).astype(f8)
    i = np.searchsorted(_MID, a, side="left")  # a == mid -> lower index
    tie = (i < len(_MID)) & (a == _MID[np.minimum(i, len(_MID) - 1)])
    i = np.where(tie & (i % 2 == 1), i + 1, i)
    i = np.where(np.isnan(x), 127, i).astype(u1)
    return i | np.where(np.signbit(x), u1(128), u1(0))


def to_tf32(x):
    """nearest, ties away: 10 bits of mantissa."""
    b = x.view(u4)
    r = (b + u4(0x1000)) & u4(0xFFFFE000)
    return np.where(np.isfinite(x), r, b)


def tf32_operand(bits):
    return (bits & u4(0xFFFFE000)).view(f4)


def decode(raw, kind):
    """bytes [..., n] -> float or int64 values along the last axis."""
    if kind == "bf16":
        return from_bf16(np.ascontiguousarray(raw).view(u2))
    if kind == "f16":
        return np.ascontiguousarray(raw).view(f2).astype(f4)
    if kind == "tf32":
        return tf32_operand(np.ascontiguousarray(raw).view(u4))
    if kind == "e4m3":
        return E4M3[raw]
    if kind == "e5m2":
        return E5M2[raw]
    if kind == "s8":
        return np.ascontiguousarray(raw).view(i1).astype(f8)
    if kind == "u8":
        return raw.astype(f8)
    raise NotImplementedError(kind)


SIZE = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
