"""Tuning of the forward kernel's launch configuration, only when somebody asks for it.

:func:`tune` times the shipped configurations and their neighbours on this device and writes the fastest right one to
the user's cache directory (:mod:`.tuned`), where calls find it again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ...blockmask import BlockMask
from ...errors import KernelError
from ...layout import TokenLayout
from ...types import Precision
from .configs import Config, arch_of, choose, for_skipping, kind_of, table
from .tuned import Bucket, store

__all__ = ["Trial", "Workload", "candidates", "launch_errors", "sweep", "tune"]

#: Seconds of one launch with a configuration; raises if it cannot run or its result is wrong.
Timer = Callable[[Config], float]


@dataclass(frozen=True, eq=False)
class Workload:
    """What is timed.

    Args:
        layout: of the sequence.
        mask: the kept blocks, for ``heads`` heads.
        heads: attention heads.
        head_dim: channels of one head.
        dtype: of q, k and v.
        tail: whether the pooled tail is on.
    """

    layout: TokenLayout
    mask: BlockMask
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    tail: bool = False


@dataclass(frozen=True)
class Trial:
    """One configuration and what came of it: ``seconds``, or ``None`` and the reason."""

    config: Config
    seconds: float | None
    reason: str | None = None


def tune(workload: Workload, precision: Precision, device: torch.device, *, timer: Timer | None = None) -> Config:
    """Times every candidate and stores the fastest.

    Args:
        timer: seconds of one configuration, ``None`` for launches on ``device``.

    Returns:
        The fastest.

    Raises:
        KernelError: if the table has nothing for this, no candidate runs, or the device is not CUDA and no timer is
            given.
        OutputError: if the result cannot be written.
    """
    trials = [trial for trial in sweep(workload, precision, device, timer=timer) if trial.seconds is not None]
    if not trials:
        raise KernelError(
            f"no configuration of precision {precision.name!r} runs here; run the correctness suite first"
        )
    best = min(trials, key=lambda trial: trial.seconds or 0.0)
    assert best.seconds is not None
    store(device, Bucket.of(workload.dtype, precision, workload.head_dim, workload.layout), best.config, best.seconds)
    return best.config


def sweep(
    workload: Workload, precision: Precision, device: torch.device, *, timer: Timer | None = None
) -> Iterator[Trial]:
    """Times the candidates one after the other, the shipped choice first; stores nothing.

    Raises:
        KernelError: as :func:`tune` has it.
    """
    if timer is None:
        if device.type != "cuda":
            raise KernelError(f"configurations cannot be timed on {device.type}; give a CUDA device")
        timer = _launches(workload, precision, device)
    failures: tuple[type[Exception], ...] = (RuntimeError, KernelError, ValueError, *launch_errors())
    kind = kind_of(workload.dtype, precision)
    block_tokens = int(workload.layout.block_sizes.max())
    for config in candidates(arch_of(device), kind, workload.head_dim, block_tokens):
        try:
            yield Trial(config, timer(config))
        # a candidate that nobody compiled before may fail in the compiler, the driver or the comparison
        except failures as error:
            lines = str(error).strip().splitlines()
            yield Trial(config, None, (lines[0] if lines else type(error).__name__)[:200])


def launch_errors() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that does not compile or does not fit; empty without Triton."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def candidates(arch: int, kind: str, head_dim: int, block_tokens: int) -> tuple[Config, ...]:
    """The shipped configurations for these and their neighbours, the one that would be chosen first.

    Neighbours have one stage more or fewer, half the keys a step, or half or twice the warps; specialised warps stay
    four, because with eight Triton does not specialise them, and are also tried without.

    Raises:
        KernelError: if the table has nothing for these.
    """
    first = choose(arch, kind, head_dim, block_tokens)
    fits = [e for e in table() if e.arch == arch and e.kind == kind and e.head_dim >= head_dim]
    least = min(e.head_dim for e in fits)
    shipped = [first, *(e.config for e in fits if e.head_dim == least)]
    near = []
    for config in shipped:
        near += [replace(config, stages=config.stages + step) for step in (-1, 1) if config.stages + step >= 1]
        if config.block_n >= 64:
            near.append(replace(config, block_n=config.block_n // 2))
        if config.warp_specialize:
            near.append(for_skipping(config))
        else:
            near += [replace(config, warps=warps) for warps in (config.warps // 2, 2 * config.warps) if 4 <= warps <= 8]
    return tuple(dict.fromkeys([*shipped, *near]))


def _launches(workload: Workload, precision: Precision, device: torch.device) -> Timer:
    """Times the kernel on Gaussian tensors; a result unlike the shipped configuration's is an error."""
    from triton.testing import do_bench

    from .launch import launch

    generator = torch.Generator(device=device).manual_seed(0)
    shape = (1, workload.layout.tokens, workload.heads, workload.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(workload.dtype) for _ in range(3))
    mask = workload.mask.to(device)
    right: list[torch.Tensor] = []
    # two roundings of fp8 weights, relative to different maxima, and none of them elsewhere
    allowed = 0.06 if precision.pv == "fp8" else 4 * torch.finfo(workload.dtype).eps

    def timer(config: Config) -> float:
        def run() -> torch.Tensor:
            out = launch(q, k, v, workload.layout, mask, precision=precision, tail=workload.tail, config=config)
            assert isinstance(out, torch.Tensor)
            return out

        out = run().float()
        if right:
            error = float((out - right[0]).norm() / right[0].norm())
            if not error <= allowed:
                raise KernelError(f"its result is {error:.1e} from the shipped configuration's; allowed {allowed:.1e}")
        else:
            right.append(out)
        times = do_bench(run, warmup=20, rep=100, return_mode="all")
        return statistics.median(times) / 1e3

    return timer
