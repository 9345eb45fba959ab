"""Compiles a kernel for a GPU that is not here, and reads the machine code.

Triton ships the assembler and the disassembler, so everything but running works on any machine. The proof of a launch
configuration is what the assembler's log and the machine code say about it::

    code = compile_for(90, lambda: kernel.warmup(*meta_tensors, grid=(1,), num_warps=8))
    assert problems(code, products=["bf16"]) == []

An architecture is a compute capability (80, 86, 89, 90, 100, 103, 120) or the name of an AMD one (``"gfx942"``).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.errors import TritonError

from ...errors import KernelError
from .coordinates import TileCopy, tile_copies
from .disassembly import ANY_PRODUCT, amdgcn, argument_stores, loops_of, sass

__all__ = ["SHARED_MEMORY", "MachineCode", "compile_for", "problems"]

_KIB = 1024

#: Most shared memory of one program in bytes (CUDA programming guide, table of compute capabilities; CDNA 3 manual).
SHARED_MEMORY: Mapping[int | str, int] = {
    80: 163 * _KIB,
    86: 99 * _KIB,
    89: 99 * _KIB,
    90: 227 * _KIB,
    100: 227 * _KIB,
    103: 227 * _KIB,
    120: 99 * _KIB,
    "gfx942": 64 * _KIB,
}

#: Generation of the tensor cores that each architecture must use.
_TENSOR_CORES: Mapping[int | str, str] = {
    **dict.fromkeys((80, 86, 89, 120), "mma"),
    90: "wgmma",
    **dict.fromkeys((100, 103), "tcgen05"),
    "gfx942": "mfma",
}

#: What a product looks like in machine code: pattern of the whole mnemonic.
_PRODUCTS: Mapping[str, Mapping[str, str]] = {
    "mma": {
        "bf16": r"HMMA\..*BF16",
        "fp16": r"HMMA\.\d+\.F(16|32)$",
        "tf32": r"HMMA\..*TF32",
        "int8": r"IMMA\..*S8\.S8",
        "fp8": r"QMMA\..*E4M3\.E4M3",
    },
    "wgmma": {
        "bf16": r"HGMMA\..*BF16",
        "fp16": r"HGMMA\.[\dx]+\.F(16|32)$",
        "tf32": r"HGMMA\..*TF32",
        "int8": r"IGMMA\..*S8\.S8",
        "fp8": r"QGMMA\..*E4M3\.E4M3",
    },
    # the formats of these are in a descriptor in memory, not in the mnemonic
    "tcgen05": {"bf16": "UTCHMMA", "fp16": "UTCHMMA", "tf32": "UTCHMMA", "int8": "UTCIMMA", "fp8": "UTCQMMA"},
    "mfma": {
        "bf16": r"v_mfma_f32_\w+_bf16",
        "fp16": r"v_mfma_f32_\w+_f16",
        "tf32": r"v_mfma_f32_\w+_xf32",
        "int8": r"v_mfma_i32_\w+_i8",
        "fp8": r"v_mfma_f32_\w+_fp8_fp8",
    },
}

#: Products of the generation before, which run at a fraction of the speed on these tensor cores.
_LEGACY: Mapping[str, str] = {"wgmma": r"[HIQ]MMA\b", "tcgen05": r"[HIQ]MMA\b"}

#: Most stores to shared memory by which a loop may reduce something over the rows of a tile.
_REDUCTION_STORES = 4

_DEVICES = itertools.count()


@dataclass(frozen=True)
class MachineCode:
    """What the assembler and the machine code say about one compiled kernel.

    Args:
        kernel: its name.
        arch: compute capability, or the name of an AMD architecture.
        registers: of one thread.
        stack: bytes of stack of one thread.
        spill_bytes: bytes of registers written to and read from memory, by the assembler's count.
        shared_memory: bytes of one program.
        num_warps: of one program; more than asked for if warps are specialised.
        serialised: why the assembler waits for every product before the next, ``None`` if it does not.
        warnings: the assembler's warnings, complete.
        instructions: how often each instruction occurs, by its whole mnemonic (``HGMMA.64x128x16.F32.BF16``).
        loops: the same for every loop with all that is inside it, in program order.
        main_loop: that of ``loops`` with the most products; an inner one, not those around it.
        argument_stores: stores to local memory that only pass an argument to a call.
        warp_specialised: whether warps have different code.
        copies: where the copy engine's tiles begin.
    """

    kernel: str
    arch: int | str
    registers: int
    stack: int
    spill_bytes: int
    shared_memory: int
    num_warps: int
    serialised: str | None
    warnings: tuple[str, ...]
    instructions: Mapping[str, int]
    loops: tuple[Mapping[str, int], ...]
    main_loop: Mapping[str, int]
    argument_stores: int
    warp_specialised: bool
    copies: tuple[TileCopy, ...] = ()

    def count(self, pattern: str, within: Mapping[str, int] | None = None) -> int:
        """How many instructions match a pattern at their beginning, in the kernel or ``within`` one of its loops."""
        counts = self.instructions if within is None else within
        return sum(n for mnemonic, n in counts.items() if re.match(pattern, mnemonic))

    @property
    def tma_loads(self) -> int:
        """Tile loads by the copy engine."""
        return self.count(r"UTMALDG\b")

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory, without the arguments of calls.

        Those exist on sm_120: beside each tile load the assembler puts a call of the runtime, for a destination in
        another program of a cluster, and its last argument goes over the stack. Without clusters it is never called.
        """
        return self.count(r"(LDL|STL|scratch_)\b|scratch_") - self.argument_stores


def compile_for(arch: int | str, warmup: Callable[[], Any]) -> MachineCode:
    """Compiles one kernel for an architecture and reads the result. Takes 0.3 to 5 seconds; nothing is cached.

    Args:
        arch: a key of :data:`SHARED_MEMORY`.
        warmup: calls one kernel's ``warmup`` (tensors on device ``meta``, ``grid=(1,)``, options) and returns what it
            returns. Every call compiles anew, so one process can go through many architectures.

    Raises:
        KernelError: if the architecture is not known, the interpreter is on, or the compiler gives up.
    """
    if arch not in SHARED_MEMORY:
        raise KernelError(f"the gate does not know architecture {arch!r}; known are {list(SHARED_MEMORY)}")
    if triton.knobs.runtime.interpret:
        raise KernelError("the gate cannot compile with TRITON_INTERPRET=1; unset it before triton is imported")
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    with _compiler_for(target) as output:
        try:
            compiled = warmup()
        except (TritonError, RuntimeError) as error:
            cause = error.__cause__ or error
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
            raise KernelError(f"Triton {triton.__version__} cannot compile for {arch}: {_told(lines)}") from error
    read = _read_nvidia if isinstance(arch, int) else _read_amd
    return read(arch, compiled, output.getvalue())


def problems(
    code: MachineCode,
    *,
    products: Sequence[str] = (),
    warp_specialised: bool = False,
    tma: bool = False,
    whole_rows: Sequence[str] = (),
) -> list[str]:
    """What is wrong with the machine code, a sentence each; empty if nothing.

    Args:
        products: operand formats that the tensor cores must multiply: ``bf16``, ``fp16``, ``tf32``, ``int8``, ``fp8``.
        warp_specialised: whether warp specialisation was asked for.
        tma: whether tiles must be loaded by the copy engine.
        whole_rows: tiles that span all columns and are copied by the copy engine, so in column 0; the names of their
            descriptors in the source.
    """
    cores = _TENSOR_CORES[code.arch]
    found = []
    if code.spill_bytes:
        found.append(f"{code.spill_bytes} bytes of registers are spilled to memory")
    if code.local_accesses:
        found.append(f"{code.local_accesses} instructions access local memory")
    elif code.stack and not code.argument_stores:
        found.append(f"every thread has {code.stack} bytes of stack")
    if code.serialised is not None:
        found.append(f"products are serialised: {code.serialised}")
    limit = SHARED_MEMORY[code.arch]
    if code.shared_memory > limit:
        found.append(f"{code.shared_memory} bytes of shared memory are above the architecture's {limit}")
    for name in products:
        if name not in _PRODUCTS[cores]:
            raise KernelError(f"there is no operand format {name!r}; valid are {list(_PRODUCTS[cores])}")
        if not code.count(_PRODUCTS[cores][name]):
            seen = sorted(mnemonic for mnemonic in code.instructions if re.match(ANY_PRODUCT, mnemonic))
            found.append(f"no {name} product on the tensor cores ({cores}); there are {', '.join(seen) or 'none'}")
    legacy = code.count(_LEGACY[cores]) if cores in _LEGACY else 0
    if legacy:
        found.append(f"{legacy} products are of the generation before {cores}")
    staged = code.count(r"STSM?\b", code.main_loop)
    # a reduction over rows stores a few numbers; tf32 products are exempt, float32 is split through shared memory
    if cores == "wgmma" and staged > _REDUCTION_STORES and "tf32" not in products:
        found.append(f"{staged} stores to shared memory in the main loop: an operand is rearranged there each time")
    if warp_specialised and not code.warp_specialised:
        found.append("warp specialisation was asked for and is not there")
    if tma and not code.tma_loads:
        found.append("no tile is loaded by the copy engine")
    if code.warp_specialised:
        # see coordinates.py: where both are one value, specialisation moves the columns with the rows
        found += [f"{copy}: row and column are one value" for copy in code.copies if copy.at[-2:-1] == copy.at[-1:]]
    for tile in whole_rows:
        copies = [copy for copy in code.copies if copy.tile == tile]
        found += [f"{copy}, which is not column 0" for copy in copies if copy.at[-1] != 0]
        if not copies:
            found.append(f"the copy engine copies no {tile}")
    return found


class _AbsentGpu(DriverBase):
    """Answers what the compiler asks a driver. Its device number is new each time, because a kernel keeps what it has
    compiled by device number, whatever the target, and would hand out an earlier target's code."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__()
        self.target = target
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
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise KernelError("a GPU that is not here cannot be timed; give the kernel one configuration")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10) if isinstance(self.target.arch, int) else (9, 4)


@contextlib.contextmanager
def _compiler_for(target: GPUTarget) -> Iterator[io.StringIO]:
    """Triton compiles for ``target`` without its disk cache, and the assembler's log goes to what this yields."""
    knobs, drivers = triton.knobs, triton.runtime.driver
    before = drivers._active
    with contextlib.ExitStack() as stack:
        for group in (knobs.compilation, knobs.nvidia, knobs.language, knobs.cache):
            stack.enter_context(group.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.nvidia.dump_ptxas_log = True
        knobs.language.default_fp_fusion = True  # the default, said aloud: Triton 3.9 warns that it will change
        drivers.set_active(_AbsentGpu(target))
        try:
            yield stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        finally:
            drivers.set_active(before)


def _told(lines: list[str]) -> str:
    """The line of a compiler's message that says most: the assembler's error, or the last one."""
    return next(
        (line for line in lines if "error" in line.lower() and "PTXAS" not in line), lines[-1] if lines else "?"
    )


def _read_nvidia(arch: int | str, compiled: Any, log: str) -> MachineCode:
    numbers = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not numbers or not registers:
        raise KernelError(f"the assembler of Triton {triton.__version__} wrote a log that the gate cannot read: {log}")
    warnings = tuple(re.findall(r"(?:warning|info)\s*: (\(C\d+\).*)", log))
    serialised = re.search(r"serialized due to (.+?) in (?:the )?function", log)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        # without the analysis of branch stacks, which would take a third of the time and adds nothing that is read here
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = sass(text)
    instructions = Counter(line.mnemonic for line in code)
    loops, main = loops_of(code)
    partitioned = "ttg.warp_specialize(" in compiled.asm["ttgir"]
    moves_registers = any(mnemonic.startswith("USETMAXREG") for mnemonic in instructions)
    return MachineCode(
        kernel=compiled.metadata.name,
        arch=arch,
        registers=max(map(int, registers)),
        stack=max(int(stack) for stack, _, _ in numbers),
        spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in numbers),
        shared_memory=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        serialised=serialised.group(1) if serialised else ("no reason given" if "serialized" in log else None),
        warnings=warnings,
        instructions=instructions,
        loops=loops,
        main_loop=main,
        argument_stores=argument_stores(code),
        # sm_120 has the partitions, but no instruction to move registers between them
        warp_specialised=partitioned and (moves_registers or _TENSOR_CORES[arch] == "mma"),
        copies=tile_copies(compiled.asm["ttgir"]),
    )


def _read_amd(arch: int | str, compiled: Any, log: str) -> MachineCode:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"^\s*(?:- )?\.{key}:\s*(\d+)", text, re.M).group(1))  # type: ignore[union-attr]

    code = amdgcn(text)
    loops, main = loops_of(code)
    return MachineCode(
        kernel=compiled.metadata.name,
        arch=arch,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spill_bytes=4 * number("vgpr_spill_count"),
        shared_memory=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        serialised=None,
        warnings=(),
        instructions=Counter(line.mnemonic for line in code),
        loops=loops,
        main_loop=main,
        argument_stores=0,
        warp_specialised=False,
    )
