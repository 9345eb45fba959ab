"""When the Hopper kernel runs instead of the one for every device, and how.

It cannot be proven on a CPU: Triton's interpreter does not run Gluon. So it is chosen only on a device where its
self-test (:mod:`..selftest`) has passed, which happens in a process of its own when it is first wanted there. Until
then and wherever it fails, :mod:`.forward` computes the same, and a warning says why.

Importing this needs no Gluon; the kernel is imported once the device is a Hopper.
"""

from __future__ import annotations

import json
import math
import warnings
from functools import partial
from typing import Any

import torch
import triton

from ...blockmask import BlockMask
from ...errors import VidaccelWarning
from ...layout import TokenLayout
from ...types import PRECISIONS, Precision
from .. import selftest
from ..contract import Skips
from ..selftest.machine import machine, source_digest
from .configs import Config
from .preparation import Prepared, append_means, prepare
from .worklist import WorkList, worklist

__all__ = ["CONFIG", "attend_into", "launch_arguments", "run", "self_test", "unsupported", "why_not"]

#: Two warpgroups of 64 rows, 128 keys a step, two steps in flight: what registers and shared memory hold at D = 128.
CONFIG = Config(block_m=128, block_n=128, warps=4, stages=2, warp_specialize=True)

#: Registers of a thread while the kernel starts; afterwards a consumer has 240 and the producer 24.
_REGISTERS = 168

_LOG2_E = 1.0 / math.log(2.0)


def why_not(
    q: torch.Tensor, layout: TokenLayout, precision: Precision, *, skip: bool, rule: bool = False
) -> str | None:
    """Why the Hopper kernel does not serve q [B,S,H,D], or ``None``; tests the kernel if that was never done here."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on CUDA devices, not on {q.device.type}"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return "it needs warpgroup products, which compute capability 9.0 alone has"
    if rule:
        return "it does not mask tokens within a key piece"
    reason = unsupported(q.dtype, q.shape[-1], precision, int(layout.block_sizes.max()), skip=skip)
    return _failure(q.device.index) if reason is None else reason


def unsupported(
    dtype: torch.dtype, head_dim: int, precision: Precision, block_tokens: int, *, skip: bool
) -> str | None:
    """Why the kernel does not compute such a call, or ``None``; whatever the device.

    Args:
        block_tokens: tokens of the largest block.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bf16, fp16 and fp8, not {dtype}"
    if (precision.qk, precision.pv) not in (("native", "native"), ("fp8", "fp8")):
        return f"precision {precision.name!r} is neither native nor fp8 throughout"
    if precision.quantised and precision.granularity == "rows32":
        return "scales of 32 rows differ within a key piece, and it reads one scale for each"
    if precision.smooth_q:
        return "Q smoothing adds a term to every score, which it does not read"
    if skip:
        return "it does not skip key pieces"
    if head_dim > 128 or head_dim % 8:
        return f"it takes multiples of 8 up to 128 channels, not {head_dim}"
    if block_tokens <= CONFIG.block_m // 2:
        return f"blocks of {block_tokens} tokens would leave one of its two warpgroups idle"
    return None


def run(
    ready: Prepared,
    out: torch.Tensor,
    lse: torch.Tensor,
    work: WorkList,
    layout: TokenLayout,
    precision: Precision,
    scale: float,
    skips: Skips | None,
    config: Config,
) -> None:
    """Fills ``out`` [B,S,H,D] and, unless it is empty, ``lse`` [B,H,S] from prepared operands.

    Args:
        work: cut with the sizes of :data:`CONFIG`, which ``config`` must be.
        skips: ``None``.
    """
    from .hopper import block_sparse_forward_hopper

    arguments, options = launch_arguments(ready, out, lse, work, layout, precision, scale)
    with torch.cuda.device(out.device):
        block_sparse_forward_hopper[(work.order.numel(),)](*arguments, **options)


def launch_arguments(
    ready: Prepared,
    out: torch.Tensor,
    lse: torch.Tensor,
    work: WorkList,
    layout: TokenLayout,
    precision: Precision,
    scale: float,
) -> tuple[list[Any], dict[str, Any]]:
    """The kernel's arguments and options; ``meta`` tensors will do for the compile gate."""
    _, tokens, heads, channels = ready.q.shape
    fp8 = precision.pv == "fp8"
    block_d = max(64, triton.next_power_of_2(channels))
    pieces = len(work.q)
    wide_batch, wide_head = (0 if n == 1 else 1 for n in work.kv_num.shape[:2])
    if fp8:
        v_tile = _descriptor(ready.v.flatten(0, 2)[None, None], block_d, CONFIG.block_n)
    else:
        v_tile = _descriptor(ready.v.transpose(1, 2), CONFIG.block_n, block_d)
    none = out  # stands in for a tensor that this precision does not read
    arguments = [
        _descriptor(ready.q.transpose(1, 2), CONFIG.block_m // 2, block_d),
        _descriptor(ready.k.transpose(1, 2), CONFIG.block_n, block_d),
        v_tile,
        out,
        lse,
        *(none if x is None else x for x in (ready.q_scale, ready.k_scale, ready.v_scale, ready.v_mean)),
        *(work.q.start, work.q.length, work.q.block, work.k.start, work.k.length),
        work.k_aligned if fp8 else work.k.start,
        *(work.kv_num, work.kv_index, work.order),
        none if work.bias is None else work.bias,
        *(out.stride(i) for i in (0, 1, 2)),
        wide_batch * work.kv_num.shape[1] * pieces,
        wide_head * pieces,
        tokens,
        ready.k.shape[1],
        heads,
        pieces,
        layout.num_blocks,
        work.exact,
        work.kv_index.shape[-1],
        0 if work.bias is None else work.bias.shape[1],
        scale * _LOG2_E,
    ]
    options = {
        "D": channels,
        "BLOCK_D": block_d,
        "BLOCK_N": CONFIG.block_n,
        "STAGES": CONFIG.stages,
        "FP8": fp8,
        "V_MEAN": ready.v_mean is not None,
        "RAGGED": work.ragged,
        "BIAS": work.bias is not None,
        "LSE": lse.numel() > 0,
        "num_warps": CONFIG.warps,
        "maxnreg": _REGISTERS,
    }
    return arguments, options


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> Any:
    """Tiles of ``rows`` x ``columns`` of the last two of four dimensions of ``x``."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    formats = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
    block = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, formats[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


# -- the self-test ----------------------------------------------------------------------------------------------------


def attend_into(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    mask: BlockMask,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    precision: Precision,
    tail: bool,
) -> None:
    """The whole call as :func:`.launch.launch` makes it, into given tensors; aligned inputs, without K smoothing."""
    batch, _, heads, channels = q.shape
    work = worklist(mask, layout, batch, heads, CONFIG.block_m, CONFIG.block_n, tail=tail)
    if precision.quantised:
        ready = prepare(q, k, v, layout, precision, tail=tail)
    elif tail:
        ready = Prepared(q, append_means(k, layout), append_means(v, layout))
    else:
        ready = Prepared(q, k, v)
    run(ready, out, lse, work, layout, precision, 1 / math.sqrt(channels), None, CONFIG)


def self_test(device: str) -> None:
    """Examines the kernel on a device and prints the verdict as JSON; what the process of its own runs."""
    found = selftest.examine(attend_into, torch.device(device), _cases(), lambda case: print(case, flush=True))
    print(json.dumps(found.to_dict()))


def _cases() -> list[selftest.Case]:
    return [
        case
        for case in selftest.CASES
        if unsupported(case.dtype, case.head_dim, PRECISIONS[case.precision], math.prod(case.tile), skip=False) is None
    ]


#: Devices whose verdict this process knows: why the kernel must not run there, or ``None``.
_FAILURES: dict[int, str | None] = {}


def examined(index: int, seconds: float = selftest.PATIENCE) -> tuple[selftest.Verdict, bool]:
    """The verdict on the kernel on a device, and whether it is fresh.

    Args:
        index: of the CUDA device.
        seconds: after which a test that runs is ended.
    """
    told = {**machine(torch.device("cuda", index)), "triton": triton.__version__, "kernel": source_digest()}

    def test() -> selftest.Verdict:
        selftest.on_screen("the Hopper kernel first, in a process of its own ", "")
        dot = partial(selftest.on_screen, ".", "")
        made = selftest.in_own_process(__name__, "self_test", f"cuda:{index}", seconds, lambda case: dot())
        selftest.on_screen(f" {made}; ", "")
        return made

    return selftest.verdict("hopper", told, test)


def _failure(index: int) -> str | None:
    """Why the kernel must not run on a device; said aloud once if its self-test failed."""
    if index not in _FAILURES:
        if torch.cuda.is_current_stream_capturing():
            return "it is not tested yet on this device, and a graph is being captured; run once before capturing"
        found, _ = examined(index)
        _FAILURES[index] = None if found.passed else f"its self-test on this device: {found}"
        if not found.passed:
            message = (
                f"the Hopper kernel is not used on cuda:{index}, the Triton kernel for every device runs instead:"
                f" {_FAILURES[index]}"
            )
            warnings.warn(message, VidaccelWarning, stacklevel=2)
    return _FAILURES[index]
