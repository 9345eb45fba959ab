"""Repairs Triton's CPU interpreter (TRITON_INTERPRET=1), so that a kernel's result on a CPU is its result on a GPU.

The stock interpreter of Triton 3.6.0 and 3.9.0 keeps bf16 and fp8 tensors as raw bits, and in places computes on the
bits as if they were integers: results are wrong without any error. Each function ``_repair_*`` below states one symptom
and its cause; ``test_repair.py`` tests each, and that the stock interpreter still needs it. The last one repairs no
result, but the time that it takes.

What stays different from a GPU: sums are taken in another order, products of float32 are not rounded to tf32, and
programs run one after the other, so races and deadlocks are not found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

__all__ = ["install"]

Array = npt.NDArray[Any]

#: Formats kept as raw bits: torch's dtype and the largest finite value.
_FP8 = {
    tl.float8e4nv: (torch.float8_e4m3fn, 448.0),
    tl.float8e5: (torch.float8_e5m2, 57344.0),
}
_RAW = (tl.bfloat16, *_FP8)
_FP8_VALUES = {
    kind: torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy() for kind, (dtype, _) in _FP8.items()
}
_FLOATS = (tl.float16, tl.float32, tl.float64, *_RAW)


def install() -> None:
    """Repairs the interpreter of this process, once. Triton must have been imported with TRITON_INTERPRET=1.

    Raises:
        RuntimeError: if the interpreter is off, or a newer Triton lacks something that a repair replaces.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the interpreter is off; set TRITON_INTERPRET=1 before triton is first imported")
    from triton.runtime import interpreter

    if getattr(interpreter, "_repaired", False):
        return
    builder = interpreter.InterpreterBuilder
    _repair_casts(interpreter, builder)
    _repair_arithmetic(interpreter, builder)
    _repair_dot(interpreter, builder)
    _repair_reductions(interpreter)
    _repair_constants(builder)
    _repair_indices(interpreter)
    _repair_patching(interpreter)
    interpreter._repaired = True


def decode(data: Array, kind: tl.dtype) -> Array:
    """The values of raw bits as float32; other arrays unchanged."""
    if kind == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in _FP8:
        return _FP8_VALUES[kind][data.view(np.uint8)]
    return data


def encode(values: Array, kind: tl.dtype, np_dtype: npt.DTypeLike) -> Array:
    """Raw bits of values, as NVIDIA's conversions have it: to nearest even, NaN stays NaN, fp8 saturates."""
    if kind == tl.bfloat16:
        values = np.ascontiguousarray(values, dtype=np.float32)
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
    if kind in _FP8:
        dtype, largest = _FP8[kind]
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        return tensor.clamp(-largest, largest).to(dtype).view(torch.uint8).numpy()
    return values.astype(np_dtype)


def _repair_casts(interpreter: Any, builder: Any) -> None:
    """Symptom: float32 to bf16 is off by a unit in the last place for half of all values, float32 to e4m3 for up to a
    third, and NaN or large values become arbitrary numbers. Cause: bits are cut off or rounded up without ties, carry
    into the exponent, or saturation."""
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def cast(source: Any, kind: tl.dtype) -> Any:
        values = decode(source.data, source.dtype.scalar)
        return interpreter.TensorHandle(encode(values, kind, interpreter._get_np_dtype(kind)), kind)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar in _RAW or target.scalar in _RAW:
            return cast(source, target.scalar)
        return stock_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        known = source.dtype.scalar in _FLOATS and target.scalar in _FLOATS
        if known and rounding != toward_zero:
            return cast(source, target.scalar)
        return stock_fp_to_fp(self, source, target, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_arithmetic(interpreter: Any, builder: Any) -> None:
    """Symptom: 1.0 + 1.0 in bf16 is 1.7e38. Cause: numpy adds the raw bits. Here each operation is done in float32 and
    rounded once, as the hardware does."""
    stock_unary, stock_binary = builder.unary_op, builder.binary_op
    stock_ternary, stock_fma = builder.ternary_op, builder.create_fma

    def result(values: Array, kind: tl.dtype) -> Any:
        if values.dtype == np.bool_:
            return interpreter.TensorHandle(values, tl.int1)
        return interpreter.TensorHandle(encode(values, kind, interpreter._get_np_dtype(kind)), kind)

    def unary_op(self: Any, x: Any, op: Callable[..., Array]) -> Any:
        kind = x.dtype.scalar
        return result(op(decode(x.data, kind)), kind) if kind in _RAW else stock_unary(self, x, op)

    def binary_op(self: Any, x: Any, y: Any, op: Callable[..., Array]) -> Any:
        kind = x.dtype.scalar
        if kind not in _RAW:
            return stock_binary(self, x, y, op)
        return result(op(decode(x.data, kind), decode(y.data, y.dtype.scalar)), kind)

    def ternary_op(self: Any, x: Any, y: Any, z: Any, op: Callable[..., Array]) -> Any:
        kind = z.dtype.scalar
        if kind not in _RAW or op is np.where:
            return stock_ternary(self, x, y, z, op)
        return result(op(*(decode(value.data, value.dtype.scalar) for value in (x, y, z))), kind)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        kind = z.dtype.scalar
        if kind not in _RAW:
            return stock_fma(self, x, y, z)
        # a product of two such values is exact in float64
        a, b, c = (decode(value.data, value.dtype.scalar).astype(np.float64) for value in (x, y, z))
        return result((a * b + c).astype(np.float32), kind)

    builder.unary_op, builder.binary_op = unary_op, binary_op
    builder.ternary_op, builder.create_fma = ternary_op, create_fma


def _repair_dot(interpreter: Any, builder: Any) -> None:
    """Symptom: bf16 dot products are of the order 1e9, int8 ones take seconds. Cause: raw bits are multiplied, and
    numpy has no fast product of integers. Here all are float products; those of int8 are exact, as every partial sum
    is a whole number below 2^24 in float32, or 2^53 in float64."""

    def create_dot(self: Any, x: Any, y: Any, start: Any, precision: Any, imprecise: Any) -> Any:
        a, b = decode(x.data, x.dtype.scalar), decode(y.data, y.dtype.scalar)
        exact_in_float32 = a.dtype.kind in "iu" and a.shape[-1] * 128 * 128 < 2**24
        wide = a.dtype == np.float64 or (a.dtype.kind in "iu" and not exact_in_float32)
        kind = np.float64 if wide else np.float32
        # torch, because its number of threads is under control
        product = torch.matmul(*(torch.from_numpy(np.array(value, dtype=kind, order="C")) for value in (a, b)))
        return interpreter.TensorHandle(product.numpy().astype(start.data.dtype) + start.data, start.dtype.scalar)

    builder.create_dot = create_dot


def _repair_reductions(interpreter: Any) -> None:
    """Symptom: a bf16 sum is 1e26. Cause: the raw bits are summed. Here the sum is taken in float32 and rounded at the
    end; a GPU rounds at each step, so kernels should sum in float32 anyway."""
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):

        def apply_impl(self: Any, inputs: Any, stock: Callable[..., Any] = operation.apply_impl) -> Any:
            kinds = [x.dtype for x in inputs]
            if not any(kind in _RAW for kind in kinds):
                return stock(self, inputs)
            wide = tuple(
                self.to_tensor(decode(x.handle.data, kind), tl.float32) if kind in _RAW else x
                for x, kind in zip(inputs, kinds, strict=True)
            )
            outputs = stock(self, wide)
            outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            return tuple(narrow(x, kind) if kind in _RAW else x for x, kind in zip(outputs, kinds, strict=True))

        operation.apply_impl = apply_impl

    def narrow(x: Any, kind: tl.dtype) -> Any:
        bits = encode(x.handle.data, kind, interpreter._get_np_dtype(kind))
        return tl.core.tensor(interpreter.TensorHandle(bits, kind), tl.block_type(kind, x.shape) if x.shape else kind)


def _repair_constants(builder: Any) -> None:
    """Symptom: ``tl.full(shape, 1.5, tl.bfloat16)`` raises AttributeError on 3.6.0. Cause: ``get_bf16`` is missing."""
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)


def _repair_indices(interpreter: Any) -> None:
    """Symptom: ``range(loaded)`` raises TypeError on 3.6.0 with numpy 2.4. Cause: scalars are arrays of one element,
    which numpy no longer makes an ``int``."""
    stock = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        stock(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_patching(interpreter: Any) -> None:
    """Symptom: kernels that call device functions take twice as long. Cause: each such call patches all of
    triton.language once more. Here a launch patches each module once; it undoes that at its end, as before."""
    stock_patch, stock_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()

    def patch_lang(function: Any) -> Any:
        seen = function.__globals__.values()
        modules = any(value is tl for value in seen), any(value is tl.core for value in seen)
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return stock_patch(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return stock_launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, launch
