# ruff: noqa
"""Triton kernels on the emulator: JITFunction.run of the whole process is ours while ``emulating`` lasts."""

from __future__ import annotations
import contextlib, ctypes, time
from dataclasses import dataclass
import numpy as np
import torch
import triton
from .formats import u1
from .cta import Cta, Global, TensorMap, GB
from .cta import Fault as _Raised, Deadlock as _Deadlocked
from .faults import Deadlock, Fault
from .text import parse
from .program import Program

_KIND = {
    "i1": (1, "?"),
    "i8": (1, "b"),
    "u8": (1, "B"),
    "i16": (2, "h"),
    "u16": (2, "H"),
    "i32": (4, "i"),
    "u32": (4, "I"),
    "i64": (8, "q"),
    "u64": (8, "Q"),
    "fp32": (4, "f"),
    "f32": (4, "f"),
    "fp64": (8, "d"),
    "fp16": (2, "e"),
}


@dataclass(frozen=True)
class Launch:
    """What one launch did."""

    kernel: str
    ctas: int
    instructions: int
    mma: int
    wgmma: int
    tma: int
    seconds: float


def _kind(text):
    """The kind of a fault, from its text."""
    for kind, words in (
        ("proxy", ("proxy:",)),
        ("race", ("race:", "different values to one")),
        ("uninitialised", ("never written",)),
        ("alignment", ("aligned to", "not aligned")),
        ("bounds", ("out of bounds", "shared access at", "of shared", "generic address", "operand reaches", "tile at")),
        ("unfinished", ("not waited for", "ends with", "middle of phase", "different numbers of wgmma")),
        ("registers", ("setmaxnreg",)),
        ("fence", ("wgmma.fence", "not committed", "fence", "tensormap")),
        ("lanes", ("part of the warp", "differs between lanes", "does not take part")),
        ("barrier", ("barrier",)),
    ):
        if any(w in text for w in words):
            return kind
    return "barrier"


class Emulator:
    """Executes every Triton launch inside ``with emulating(emulator)``; collects ``faults`` and a ``log`` of launches.

    Args:
        arch: compute capability the kernels are compiled for, 90 for sm_90a.
        asynchronous: when copies and products in flight complete: "late" (when somebody waits for them), "early" (at
            once) or "random".
        schedule: which warp runs next: "in-turn" or "random".
        seed: of what is drawn.
        edit: PTX text -> PTX text, applied before it is loaded: puts faults into a program.
        only: ``(x, y, z) -> bool``, the CTAs of a grid that run.
        proxies: "advice" or "error": see ``errors``.

    Example:
        >>> emulator = Emulator(arch=90)
        >>> with emulating(emulator):
        ...     kernel[grid](x, y, n, BLOCK=128)
        >>> emulator.errors
        []
    """

    def __init__(
        self, arch=90, *, asynchronous="late", schedule="in-turn", seed=0, edit=None, only=None, proxies="advice"
    ):
        for name, value, valid in (
            ("asynchronous", asynchronous, ("late", "early", "random")),
            ("schedule", schedule, ("in-turn", "random")),
            ("proxies", proxies, ("advice", "error")),
        ):
            if value not in valid:
                raise ValueError(f"{name} is {value!r}; valid are {', '.join(map(repr, valid))}")
        self.arch = arch
        self.options = dict(asynchronous=asynchronous, schedule="rr" if schedule == "in-turn" else schedule, seed=seed)
        self.edit = edit
        self.only = only
        self.proxies = proxies
        self.programs = {}
        self.faults: list[Fault] = []
        self.log: list[Launch] = []

    @property
    def errors(self):
        """The faults without those that are advice: all kinds, ``proxy`` only where ``proxies`` is "error"."""
        return [fault for fault in self.faults if fault.kind != "proxy" or self.proxies == "error"]

    def program(self, ptx):
        if self.edit:
            ptx = self.edit(ptx)
        if ptx not in self.programs:
            self.programs[ptx] = Program(parse(ptx))
        return self.programs[ptx]

    def launch(self, kernel, grid, values):
        """``values``: of all parameters that are not constexpr, in order: (type, value)."""
        prog = self.program(kernel.asm["ptx"])
        g = Global()
        blocks = {}

        def pointer(t):
            st = t.untyped_storage()
            if t.device.type == "meta" or st.nbytes() == 0:
                return GB + 64
            key = st.data_ptr()
            if key not in blocks:
                shift = key % 256
                base = g.alloc(st.nbytes() + shift, str(tuple(t.shape)) + str(t.dtype))
                g.ok[base - GB : base - GB + shift] = False
                raw = np.ctypeslib.as_array((ctypes.c_uint8 * st.nbytes()).from_address(key))
                g.mem[base + shift - GB : base + shift - GB + st.nbytes()] = raw
                blocks[key] = (base + shift, raw, st)
            return blocks[key][0] + t.data_ptr() - key

        flat = []
        descs = list(getattr(kernel.metadata, "tensordesc_meta", None) or [])
        for ty, v in values:
            if isinstance(ty, str) and ty.startswith("tensordesc"):
                meta = descs.pop(0)
                assert meta is not None
                base = pointer(v.base)
                es = meta["elem_size"]
                flat.append(
                    (
                        "map",
                        TensorMap.make(
                            base,
                            meta["elem_type"],
                            meta["swizzle"],
                            meta["block_size"][::-1],
                            list(v.shape)[::-1],
                            [s * es for s in list(v.strides)[::-1][1:]],
                            1 if v.padding == "nan" else 0,
                        ),
                    )
                )
                flat += [("i32", s) for s in v.shape] + [("i64", s) for s in v.strides]
            elif isinstance(ty, str) and ty.startswith("*"):
                flat.append(("ptr", pointer(v)))
            else:
                flat.append((ty, v))
        n = int(np.prod(grid))
        scratch = kernel.metadata.global_scratch_size
        base = g.alloc(max(scratch * n, 1), "scratch")
        flat += [("ptr", base), ("ptr", 0)]
        size = prog.k.params[-1][1] + prog.k.params[-1][2]
        params = np.zeros(size + 64, u1)
        assert len(flat) == len(prog.k.params), (len(flat), len(prog.k.params), flat, prog.k.params)
        for (ty, v), (nm, off, sz, al) in zip(flat, prog.k.params):
            if ty == "map":
                raw = v
            elif ty == "ptr":
                raw = int(v).to_bytes(8, "little")
            else:
                import struct

                raw = struct.pack("<" + _KIND[ty][1], v)
            assert len(raw) <= sz or ty in ("i64",), (nm, ty, sz)
            params[off : off + min(len(raw), sz)] = np.frombuffer(raw[:sz], u1)
        t0 = time.process_time()
        nw = (prog.k.reqntid or kernel.metadata.num_warps * 32) // 32
        ctas = 0
        stats = {}
        for f in prog.unfenced:
            self.faults.append(Fault("fence", f))
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    if self.only is not None and not self.only(x, y, z):
                        continue
                    c = Cta(
                        prog,
                        g,
                        params,
                        nw,
                        kernel.metadata.shared,
                        (x, y, z),
                        grid,
                        maxreg=(prog.k.maxnreg + 7) // 8 * 8 if prog.k.maxnreg else None,
                        **self.options,
                    )
                    if c.regpool is not None:
                        c.regpool = 65536 - nw * 32 * c.warps[0].nregs if False else 0
                    try:
                        c.run()
                    except _Deadlocked as e:
                        self.faults.append(Deadlock(f"cta {x},{y},{z}: {e}"))
                        raise self.faults[-1] from None
                    except _Raised as e:
                        raise Fault(_kind(str(e)), f"cta {x},{y},{z}: {e}") from None
                    finally:
                        self.faults += [Fault(_kind(f), f"cta {x},{y},{z}: {f}") for f in c.faults]
                    for k, v in c.stats.items():
                        stats[k] = stats.get(k, 0) + v
                    ctas += 1
        for at, raw, st in blocks.values():
            raw[:] = g.mem[at - GB : at - GB + len(raw)]
        dt = time.process_time() - t0
        self.log.append(
            Launch(
                kernel.metadata.name,
                ctas,
                stats.get("instructions", 0),
                stats.get("mma", 0),
                stats.get("wgmma", 0),
                stats.get("tma", 0),
                dt,
            )
        )


_DEVICE = [1000]


@contextlib.contextmanager
def emulating(emu: Emulator):
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        def __init__(self):
            self.target = GPUTarget("cuda", emu.arch, 32)
            self.utils = None
            _DEVICE[0] += 1
            self.device = _DEVICE[0]

        @classmethod
        def is_active(cls):
            return False

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_current_target(self):
            return self.target

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise RuntimeError

        def get_current_device(self):
            return self.device

        def get_current_stream(self, d):
            return 0

        def get_device_capability(self, d=0):
            return divmod(emu.arch, 10)

    from triton.runtime.jit import JITFunction

    original = JITFunction.run
    drivers = triton.runtime.driver
    before = drivers._active

    def run(self, *args, grid, warmup, **kwargs):
        if warmup:
            return original(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        names = [p.name for p in self.params]
        bound = dict(zip(names, args))
        bound.update({k: v for k, v in kwargs.items() if k in names})
        for p in self.params:
            if p.name not in bound and p.has_default:
                bound[p.name] = p.default
        sig = kernel.src.signature
        values = []

        def flatten(ty, v):
            if isinstance(ty, tuple):
                for x, y in zip(ty, v, strict=True):
                    flatten(x, y)
            elif ty != "constexpr":
                values.append((ty, v))

        for nm, ty in sig.items():
            flatten(ty, bound[nm])
        if callable(grid):
            grid = grid(bound)
        grid = tuple(grid) + (1,) * (3 - len(grid))
        emu.launch(kernel, grid, values)
        return kernel

    drivers.set_active(Driver())
    JITFunction.run = run
    try:
        with np.errstate(all="ignore"):
            yield emu
    finally:
        JITFunction.run = original
        drivers.set_active(before)
