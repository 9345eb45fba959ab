"""What a step of the forward kernel's loop costs in instructions, from the machine code of a GPU that is not here.

The gate compiles a launch configuration for its architecture; the loop with the tensor-core products is one step, a key
piece of ``block_n`` keys against ``block_m`` queries. The cost model (:mod:`.costmodel`) lives on these counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from ...errors import KernelError
from ..quantise import ROWS
from .configs import Config, Entry
from .disassembly import ANY_PRODUCT
from .forward import block_sparse_forward
from .gate import MachineCode, compile_for

__all__ = ["FORMATS", "TRITON_VERSION", "StepCounts", "compile_forward", "count_step", "multiplications"]

TRITON_VERSION: str = triton.__version__

#: Operand formats of QK^T and of PV, for each kind of configuration.
FORMATS: Mapping[str, tuple[str, str]] = {
    "native16": ("bf16", "bf16"),
    "native32": ("tf32", "tf32"),
    "int8": ("int8", "bf16"),
    "int8-fp8": ("int8", "fp8"),
    "fp8-fp8": ("fp8", "fp8"),
}
_DTYPES = {
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
#: Sequences of Wan's length: 75,600 tokens in 128-token blocks, 12 heads.
_TOKENS, _HEADS, _BLOCKS = 75_600, 12, 591


@dataclass(frozen=True)
class StepCounts:
    """One program's work for one key piece, in instructions of a warp summed over its computing warps.

    Args:
        products: multiply-adds on the tensor cores by operand format, of the whole program.
        exponentials: MUFU instructions, nearly all of them EX2.
        arithmetic: other instructions of the float and integer units.
        memory: loads and stores of shared and global memory, tile copies among them.
        issued: all instructions.
        outside: instructions before and after the loop.
        shared_memory: bytes of one program.
        registers: of one thread.
        warps: computing warps.
    """

    products: Mapping[str, float]
    exponentials: float
    arithmetic: float
    memory: float
    issued: float
    outside: float
    shared_memory: int
    registers: int
    warps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def multiplications(mnemonic: str) -> tuple[str, int] | None:
    """Operand format and multiply-adds of a tensor-core instruction: of one warp, for warp-group ones of four.

    Returns:
        ``None`` if it is no such instruction, or its sizes are in a descriptor in memory (tcgen05).
    """
    name, _, rest = mnemonic.partition(".")
    if not re.fullmatch(r"[HIQ]G?MMA", name):
        return None
    wide = re.match(r"(\d+)x(\d+)x(\d+)", rest)
    narrow = re.match(r"(16)(8)(\d+)\b", rest)
    found = wide or narrow
    if found is None:
        return None
    m, n, k = (int(x) for x in found.groups())
    number_format = {"I": "int8", "Q": "fp8"}.get(name[0]) or ("tf32" if "TF32" in rest else "bf16")
    return number_format, m * n * k


def compile_forward(
    arch: int | str, kind: str, head_dim: int, config: Config, *, bias: int = 1, skip: bool = False, rule: bool = False
) -> MachineCode:
    """The forward kernel's machine code for the shapes of a long video, with everything on that is outside the loop.

    Args:
        arch: as :func:`.gate.compile_for` has it.
        kind: a key of :data:`FORMATS`.
        bias: 1 with the pooled tail, 2 with Q smoothing, 0 with neither.
        skip: whether key pieces may be skipped.
        rule: whether a rule over tokens cuts some of them.

    Raises:
        KernelError: if the compiler gives up.
    """
    qk, pv = (_DTYPES[name] for name in FORMATS[kind])
    out = torch.float32 if kind == "native32" else torch.bfloat16
    fp8_values = pv == torch.float8_e4m3fn

    def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def warmup() -> Any:
        rows = (1, _TOKENS, _HEADS, head_dim)
        row, head = _HEADS * head_dim, head_dim
        v = tensor(pv, 1, _HEADS, head_dim, _TOKENS) if fp8_values else tensor(pv, *rows)
        scales = tensor(torch.float32, 1, _HEADS, _TOKENS)
        channels = tensor(torch.float32, 1, _HEADS, head_dim)
        numbers = tensor(torch.int32, _BLOCKS)
        return block_sparse_forward.warmup(
            *(tensor(qk, *rows), tensor(qk, *rows), v, tensor(out, *rows), scales),
            *(scales, scales, channels, channels),
            *(numbers,) * 7,
            *(tensor(torch.int32, 1, _HEADS, _BLOCKS), tensor(torch.int32, 1, _HEADS, _BLOCKS, _BLOCKS)),
            *(tensor(torch.int32, _HEADS * _BLOCKS), tensor(torch.float32, _HEADS * _BLOCKS + 1, 640)),
            *(tensor(torch.int32, _HEADS, 4096), tensor(torch.int32, 3, _TOKENS)),
            *(tensor(torch.int32, 3, _BLOCKS), tensor(torch.int32, _TOKENS)),
            *(tensor(torch.float32, _HEADS), tensor(torch.int64, 1, _HEADS)),
            *(_TOKENS * row, row, head) * 2,
            *((_TOKENS * row, _TOKENS, head * _TOKENS) if fp8_values else (_TOKENS * row, row, head)),
            *(_TOKENS * row, row, head),
            *(_HEADS * _BLOCKS, _BLOCKS),
            *(_TOKENS, _TOKENS, _TOKENS, _HEADS, _BLOCKS, _BLOCKS, _BLOCKS, _BLOCKS, _HEADS * _BLOCKS + 1, 640),
            *(4096, 0.1),
            D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            QK_8BIT=not kind.startswith("native"),
            PV_FP8=fp8_values,
            ROWS_PER_SCALE=ROWS if kind == "int8-fp8" else 128,
            V_MEAN=fp8_values,
            RAGGED=True,
            BIAS=bias,
            RULE=rule,
            SKIP=skip,
            LSE=True,
            FLOAT32_PRODUCT="tf32x3" if isinstance(arch, int) else "ieee",
            WARP_SPECIALIZE=config.warp_specialize,
            num_warps=config.warps,
            num_stages=config.stages,
            grid=(1,),
        )

    return compile_for(arch, warmup)


def count_step(entry: Entry, code: MachineCode) -> StepCounts:
    """The counts of one step, from the main loop of ``entry``'s machine code.

    The loop is taken to hold one step: neither Triton nor the assembler unrolls it. With specialised warps the main
    loop is that of one computing warp group; how many there are follows from the products it does. What several warps
    do alike, because a tile is too small for all of them, is counted as often as it is done.

    Raises:
        KernelError: if the loop has fewer products than a step needs, or warps are not as the entry says.
    """
    config = entry.config
    if config.warp_specialize and not code.warp_specialised:
        raise KernelError(f"{entry} has no specialised warps; the counts would be of another kernel")
    each = float(config.block_m * config.block_n * triton.next_power_of_2(entry.head_dim))
    products: dict[str, float] = {}
    for name in FORMATS[entry.kind]:
        products[name] = products.get(name, 0.0) + each * (3 if name == "tf32" else 1)
    found: dict[str, float] = {}
    group = 1
    for mnemonic, count in code.main_loop.items():
        product = multiplications(mnemonic)
        if product is not None:
            found[product[0]] = found.get(product[0], 0.0) + product[1] * count
            group = 4 if "GMMA" in mnemonic else 1
    warps = config.warps
    if found:  # tcgen05 does not say its sizes: there the arithmetic's own count stands
        if config.warp_specialize:
            warps = group * max(1, round(min(products[name] / found[name] for name in found)))
        done = {name: found[name] * warps / group for name in found}
        if any(done[name] < 0.99 * products[name] for name in found):
            raise KernelError(f"the loop of {entry} does {done} multiply-adds, but a step needs {products}")
        products |= done
    elif not any(re.match(ANY_PRODUCT, mnemonic) for mnemonic in code.main_loop):
        raise KernelError(f"the main loop of {entry} has no products at all")
    loop = code.main_loop
    memory = code.count(r"(LD|ST|UTMA|UBLKCP|ATOM|RED|SYNCS|LDGSTS|UTCCP|UTCBAR)", loop)
    mufu = code.count(r"MUFU\b", loop)
    tensor = code.count(ANY_PRODUCT, loop)
    control = code.count(
        r"(BRA|NOP|BAR|WARPSYNC|BSSY|BSYNC|DEPBAR|WARPGROUP|CALL|RET|EXIT|YIELD|ELECT|FENCE|MEMBAR)", loop
    )
    total = sum(loop.values())
    # specialised warps have code of their own: a copy of the loop for each computing group, and the loader's
    copies = warps // 4 if config.warp_specialize else 1
    outside = (sum(code.instructions.values()) - copies * total) / (copies + 1 if config.warp_specialize else 1)
    return StepCounts(
        products=products,
        exponentials=mufu * warps,
        arithmetic=(total - memory - mufu - tensor - control) * warps,
        memory=memory * warps,
        issued=total * warps,
        outside=float(outside * warps),
        shared_memory=code.shared_memory,
        registers=code.registers,
        warps=warps,
    )
