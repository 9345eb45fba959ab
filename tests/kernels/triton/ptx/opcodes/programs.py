"""Small PTX programs as text, run on the emulator without Triton.

Where Triton is installed, its assembler takes every program first, so that no test is about text that is not PTX.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.triton.ptx.emulator.execute import execute, parameter_bytes
from tests.kernels.triton.ptx.emulator.faults import Fault
from tests.kernels.triton.ptx.emulator.memory import GlobalMemory
from tests.kernels.triton.ptx.emulator.program import load
from tests.kernels.triton.ptx.emulator.tensormap import TensorMap

__all__ = ["Run", "assembles", "module", "run"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """What a program left: its outputs by name, its faults, and the arrays it was given as they are now."""

    outputs: Mapping[str, Array]
    faults: list[Fault]
    arrays: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    @property
    def kinds(self) -> set[str]:
        """The kinds of the faults."""
        return {fault.kind for fault in self.faults}


def module(
    body: str, parameters: str = "", registers: str = "", *, warps: int = 1, target: str = "sm_90a", head: str = ""
) -> str:
    """A PTX module with one kernel ``k`` and dynamic shared memory ``smem``."""
    return (
        f".version {'8.8' if target.startswith('sm_1') else '8.7'}\n.target {target}\n.address_size 64\n"
        f".extern .shared .align 1024 .b8 smem[];\n"
        f".visible .entry k({parameters})\n.reqntid {32 * warps}\n{head}\n{{\n"
        f".reg .b32 %thread;\n.reg .b64 %slot, %place;\n.reg .pred %first;\n{registers}\n"
        f"mov.u32 %thread, %tid.x;\nsetp.eq.u32 %first, %thread, 0;\n{body}\nret;\n}}\n"
    )


@functools.lru_cache(None)
def _assembler(target: str) -> Path | None:
    """Triton has one assembler for Blackwell and one for what came before."""
    found = importlib.util.find_spec("triton")
    name = "ptxas-blackwell" if target.startswith("sm_1") else "ptxas"
    path = Path(found.origin).parent / "backends/nvidia/bin" / name if found and found.origin else None
    return path if path and path.exists() else None


@functools.lru_cache(None)
def assembles(text: str, target: str) -> str:
    """What the assembler says against a module; nothing if it takes it, or is not here."""
    assembler = _assembler(target)
    if assembler is None:
        return ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [str(assembler), f"-arch={target}", "-O0", "-o", "/dev/null", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr + done.stdout if done.returncode else ""


def run(
    body: str,
    inputs: Mapping[str, Array] | None = None,
    outputs: Mapping[str, Any] | None = None,
    *,
    arrays: Mapping[str, Array] | None = None,
    fresh: Mapping[str, int] | None = None,
    maps: Mapping[str, TensorMap] | None = None,
    registers: str = "",
    warps: int = 1,
    shared: int = 0,
    target: str = "sm_90a",
    head: str = "",
    assemble: bool = True,
    **options: Any,
) -> Run:
    """Runs ``body`` in one CTA.

    Args:
        inputs: name -> ``[threads]`` or ``[n, threads]``: the registers ``%name`` or ``%name0`` to ``%name{n-1}``.
        outputs: name -> dtype, or (n, dtype): the same for registers that are read at the end; bool is a predicate.
        arrays: name -> array in global memory, with its address in ``%name``.
        fresh: name -> bytes of global memory that nobody has written.
        maps: name -> tensormap, a parameter, with its generic address in ``%name``; the base is the offset in the
            array of the same name with ``_data`` after it.
        registers: more declarations.
    """
    inputs, outputs, arrays = dict(inputs or {}), dict(outputs or {}), dict(arrays or {})
    threads = 32 * warps
    memory = GlobalMemory()
    params: list[str] = []
    values: list[bytes] = []
    declare, before, after = [registers], [], []
    places: dict[str, tuple[slice, Any]] = {}

    def pointer(name: str, address: int) -> None:
        params.append(f".param .u64 p_{name}")
        values.append(address.to_bytes(8, "little"))

    def register(name: str, dtype: np.dtype[Any]) -> str:
        bits = "pred" if dtype.kind == "b" else f"b{max(16, 8 * dtype.itemsize)}"
        declare.append(f".reg .{bits} %{name};")
        return bits

    def slot(name: str, row: int, item: int) -> str:
        return (
            f"ld.param.u64 %place, [p_{name}];\nmul.wide.u32 %slot, %thread, {item};\nadd.u64 %slot, %slot, %place;\n"
            f"add.u64 %slot, %slot, {row * threads * item};"
        )

    for name, value in inputs.items():
        rows = np.atleast_2d(value)
        raw = np.ascontiguousarray(rows).view(np.uint8).ravel()
        address = memory.allocate(raw.size, name, written=True)
        memory.data[memory.place(address, raw.size)] = raw
        pointer(name, address)
        for i in range(len(rows)):
            own = name if value.ndim == 1 else f"{name}{i}"
            bits = register(own, rows.dtype)
            before.append(f"{slot(name, i, rows.dtype.itemsize)}\nld.global.{bits} %{own}, [%slot];")
    for name, what in outputs.items():
        n, dtype = what if isinstance(what, tuple) else (1, what)
        stored = np.dtype(np.uint32) if np.dtype(dtype).kind == "b" else np.dtype(dtype)
        size = n * threads * stored.itemsize
        address = memory.allocate(size, name, written=False)
        places[name] = memory.place(address, size), (what, stored)
        pointer(name, address)
        for i in range(n):
            own = f"{name}{i}" if isinstance(what, tuple) else name
            bits = register(own, np.dtype(dtype))
            source = own
            if bits == "pred":
                register(f"{own}_bit", stored)
                after.append(f"selp.b32 %{own}_bit, 1, 0, %{own};")
                source, bits = f"{own}_bit", "b32"
            after.append(f"{slot(name, i, stored.itemsize)}\nst.global.{bits} [%slot], %{source};")
    for name, array in arrays.items():
        address = memory.allocate(array.nbytes, name, written=True)
        places[name] = memory.place(address, array.nbytes), array
        memory.data[places[name][0]] = np.ascontiguousarray(array).view(np.uint8).ravel()
        pointer(name, address)
        declare.append(f".reg .b64 %{name};")
        before.append(f"ld.param.u64 %{name}, [p_{name}];")
    for name, size in (fresh or {}).items():
        pointer(name, memory.allocate(size, name, written=False))
        declare.append(f".reg .b64 %{name};")
        before.append(f"ld.param.u64 %{name}, [p_{name}];")
    for name, tensormap in (maps or {}).items():
        start = places[f"{name}_data"][0].start - memory.place(0, 0).start + tensormap.base
        moved = TensorMap(**{**tensormap.__dict__, "base": start})
        params.append(f".param .align 64 .b8 p_{name}[128]")
        values.append(moved.write())
        declare.append(f".reg .b64 %{name};")
        before.append(f"mov.b64 %{name}, p_{name};\ncvta.param.u64 %{name}, %{name};")
    text = module(
        "\n".join([*before, body, *after]), ", ".join(params), "\n".join(declare), warps=warps, target=target, head=head
    )
    if assemble:
        complaint = assembles(text, target)
        assert not complaint, f"{complaint}\n{text}"
    program = load(text)
    faults: list[Fault] = []
    try:
        execute(program, memory, parameter_bytes(program, values), shared=shared, faults=faults, options=options)
    except Fault as fault:
        fault.__notes__ = [f.kind for f in faults]
        raise
    found = {}
    now = {}
    for name, (place, what) in places.items():
        raw = memory.data[place]
        if name in outputs:
            kind, stored = what
            shaped = raw.view(stored).reshape(-1, threads)
            shaped = (
                shaped.astype(bool) if np.dtype(kind[1] if isinstance(kind, tuple) else kind).kind == "b" else shaped
            )
            found[name] = shaped if isinstance(kind, tuple) else shaped[0]
        else:
            now[name] = raw.view(what.dtype).reshape(what.shape)
    return Run(found, faults, now)
