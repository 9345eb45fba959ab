"""Triton kernels on the emulator: inside ``with emulating(...)`` every launch executes its compiled PTX."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from .execute import Launch, execute, parameter_bytes
from .faults import Fault
from .memory import GLOBAL, GlobalMemory
from .program import load
from .tensormap import TensorMap

__all__ = ["Emulator", "emulating"]

#: Triton's name of a scalar parameter -> format of ``struct``.
_SCALARS = {"i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}
_SCALARS |= {"fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"}
_DEVICES = itertools.count(1000)


class Emulator:
    """Executes every Triton launch inside ``with emulating(emulator)``; collects ``faults`` and a ``log`` of launches.

    Args:
        arch: compute capability the kernels are compiled for: 80, 86, 89, 90 (sm_90a) or 120.
        asynchronous: when copies and products in flight complete: "late" (when somebody waits for them), "early" (at
            once) or "random".
        schedule: which warp runs next: "in-turn" or "random".
        seed: of what is drawn.
        edit: PTX text -> PTX text, applied before it is loaded: puts faults into a program.
        only: ``(x, y, z) -> bool``, the CTAs of a grid that run.
        proxies: whether missing fences between the proxies are "advice" or "error": Triton's own compiler leaves some
            out, code that is ours must not. See ``errors``.

    Example:
        >>> emulator = Emulator(arch=90)
        >>> with emulating(emulator):
        ...     kernel[grid](x, y, n, BLOCK=128)
        >>> emulator.errors
        []
    """

    def __init__(
        self,
        arch: int = 90,
        *,
        asynchronous: str = "late",
        schedule: str = "in-turn",
        seed: int = 0,
        edit: Callable[[str], str] | None = None,
        only: Callable[[int, int, int], bool] | None = None,
        proxies: str = "advice",
    ) -> None:
        for name, value, valid in (
            ("asynchronous", asynchronous, ("late", "early", "random")),
            ("schedule", schedule, ("in-turn", "random")),
            ("proxies", proxies, ("advice", "error")),
        ):
            if value not in valid:
                raise ValueError(f"{name} is {value!r}; valid are {', '.join(map(repr, valid))}")
        self.arch = arch
        self.options = {"asynchronous": asynchronous, "schedule": schedule, "seed": seed}
        self.edit = edit
        self.only = only
        self.proxies = proxies
        self.faults: list[Fault] = []
        self.log: list[Launch] = []

    @property
    def errors(self) -> list[Fault]:
        """The faults without those that are advice: all kinds, ``proxy`` only where ``proxies`` is "error"."""
        return [fault for fault in self.faults if fault.kind != "proxy" or self.proxies == "error"]

    def launch(self, kernel: Any, grid: tuple[int, int, int], values: list[tuple[str, Any]]) -> None:
        """Executes a compiled kernel.

        Args:
            values: of all parameters that are not constexpr, in order: (type, value).
        """
        text = kernel.asm["ptx"]
        program = load(self.edit(text) if self.edit else text)
        device = _Device()
        metadata = kernel.metadata
        parameters = _flatten(device, values, list(getattr(metadata, "tensordesc_meta", None) or []))
        scratch = max(1, metadata.global_scratch_size * int(np.prod(grid)))
        parameters.append(_address(device.memory.allocate(scratch, "the scratch memory", written=False)))
        if len(parameters) < len(program.kernel.params):
            parameters.append(_address(0))  # the profiler's scratch memory: there is none
        try:
            launch = execute(
                program,
                device.memory,
                parameter_bytes(program, parameters),
                grid=grid,
                warps=metadata.num_warps,
                shared=metadata.shared,
                only=self.only,
                faults=self.faults,
                options=self.options,
            )
        finally:
            device.copy_back()
        self.log.append(launch)


def _address(value: int) -> bytes:
    return value.to_bytes(8, "little")


class _Device:
    """Global memory with copies of the tensors of one launch."""

    def __init__(self) -> None:
        self.memory = GlobalMemory()
        self.copies: dict[int, tuple[slice, Any, Any]] = {}

    def pointer(self, tensor: torch.Tensor | int) -> int:
        """The address of a tensor's first element; its whole storage is there."""
        if isinstance(tensor, int):
            return tensor
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage.nbytes() == 0:
            return GLOBAL + 64  # nothing may be read there
        key = storage.data_ptr()
        if key not in self.copies:
            # the address has the alignment that Triton has seen
            shift, size = key % 256, storage.nbytes()
            base = self.memory.allocate(size + shift, f"{tuple(tensor.shape)} {tensor.dtype}", written=True)
            self.memory.exclude(base, shift)
            host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(key))
            place = self.memory.place(base + shift, size)
            self.memory.data[place] = host
            self.copies[key] = place, host, storage
        return GLOBAL + self.copies[key][0].start + tensor.data_ptr() - key

    def copy_back(self) -> None:
        """What the kernel wrote, into the tensors."""
        for place, host, _ in self.copies.values():
            host[:] = self.memory.data[place]


def _flatten(device: _Device, values: list[tuple[str, Any]], descriptors: list[Any]) -> list[bytes]:
    """The bytes of each parameter as the launcher of Triton passes them."""
    out = []
    for kind, value in values:
        if kind.startswith("tensordesc"):
            out.append(_tensormap(device, value, descriptors.pop(0)))
            out += [struct.pack("<i", s) for s in value.shape] + [struct.pack("<q", s) for s in value.strides]
        elif kind.startswith("*"):
            out.append(_address(device.pointer(value)))
        elif kind in _SCALARS:
            out.append(struct.pack("<" + _SCALARS[kind], value))
        else:
            raise NotImplementedError(
                f"parameters of type {kind}; known are {', '.join(_SCALARS)}, pointers, tensordesc"
            )
    return out


def _tensormap(device: _Device, value: Any, meta: Any) -> bytes:
    """A tensormap that the host makes."""
    item = meta["elem_size"]
    return TensorMap(
        device.pointer(value.base),
        meta["elem_type"],  # numbered as on the device
        tuple(meta["block_size"][::-1]),
        tuple(value.shape)[::-1],
        tuple(s * item for s in list(value.strides)[::-1][1:]),
        swizzle=meta["swizzle"],
        fill=int(value.padding == "nan"),
        steps=(1,) * len(value.shape),
    ).write()


class _Driver(DriverBase):
    """Answers what Triton asks a driver. Its device number is new each time, because a kernel keeps what it has
    compiled by device number, whatever the target."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.device = next(_DEVICES)
        self.utils = None

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("an emulated kernel cannot be timed; give it one configuration")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)


@contextlib.contextmanager
def emulating(emulator: Emulator) -> Iterator[Emulator]:
    """Every launch of a Triton or Gluon kernel on CPU tensors executes its compiled PTX, in the whole process."""
    compile_or_run = JITFunction.run
    drivers = triton.runtime.driver
    before = drivers._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_or_run(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return kernel
        names = [p.name for p in self.params]
        bound = {p.name: p.default for p in self.params if p.has_default}
        bound |= dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        values: list[tuple[str, Any]] = []

        def flatten(kind: Any, value: Any) -> None:
            if isinstance(kind, tuple):
                for k, v in zip(kind, value, strict=True):
                    flatten(k, v)
            elif kind != "constexpr":
                values.append((kind, value))

        for name, kind in kernel.src.signature.items():
            flatten(kind, bound[name])
        sizes = tuple(grid(bound) if callable(grid) else grid)
        emulator.launch(kernel, (*sizes, *(1,) * (3 - len(sizes))), values)
        return kernel

    drivers.set_active(_Driver(emulator.arch))
    JITFunction.run = run
    try:
        yield emulator
    finally:
        JITFunction.run = compile_or_run
        drivers.set_active(before)
