"""Tuning of the forward kernel's launch configuration, only when somebody asks for it.

:func:`tune` times the shipped configurations and their neighbours on this device and writes the fastest right one to
the user's cache directory. :func:`tuned` finds it again; :func:`.configs.config_for` looks there before it takes the
shipped table. A file belongs to one device name and one set of versions, so that a new compiler starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...blockmask import BlockMask
from ...device import cache_dir
from ...errors import KernelError
from ...files import write_json
from ...layout import TokenLayout
from ...types import Precision
from ...version import __version__
from .configs import Config, arch_of, choose, for_skipping, kind_of, table

__all__ = ["Bucket", "Trial", "Workload", "candidates", "launch_errors", "sweep", "tune", "tuned"]

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
class Bucket:
    """Calls that share a tuned configuration.

    Args:
        kind: as :func:`.configs.kind_of` writes it.
        head_dim: channels of one head.
        block_tokens: of the largest block, rounded up to a power of two.
        tokens: of the sequence, likewise.
    """

    kind: str
    head_dim: int
    block_tokens: int
    tokens: int

    @staticmethod
    def of(dtype: torch.dtype, precision: Precision, head_dim: int, layout: TokenLayout) -> Bucket:
        """The bucket of a call."""
        return Bucket(
            kind_of(dtype, precision), head_dim, _round_up(int(layout.block_sizes.max())), _round_up(layout.tokens)
        )

    @property
    def key(self) -> str:
        """How the file calls it."""
        return f"{self.kind}/d{self.head_dim}/block{self.block_tokens}/tokens{self.tokens}"


@dataclass(frozen=True)
class Trial:
    """One configuration and what came of it: ``seconds``, or ``None`` and the reason."""

    config: Config
    seconds: float | None
    reason: str | None = None


def tuned(
    dtype: torch.dtype, precision: Precision, head_dim: int, layout: TokenLayout, device: torch.device
) -> Config | None:
    """The stored configuration for such a call on this device, or ``None``."""
    if device.type != "cuda":
        return None
    found = _stored(_path(torch.cuda.get_device_name(device)))
    return found.get(Bucket.of(dtype, precision, head_dim, layout).key)


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
    _store(device, Bucket.of(workload.dtype, precision, workload.head_dim, workload.layout), best)
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


def _path(device_name: str) -> Path:
    """The file of this device and these versions."""
    return cache_dir() / "tuning" / _file_name(device_name)


@cache
def _file_name(device_name: str) -> str:
    told = json.dumps([device_name, _versions()], sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return f"{slug}-{digest}.json"


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"vidaccel": __version__, "torch": torch.__version__}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = None
    return found


@cache
def _stored(path: Path) -> dict[str, Config]:
    """Configurations by bucket key; empty without a file. Read once, so a call does not wait for the disk."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: Config(**entry["config"]) for key, entry in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KernelError(f"the tuning file {path} cannot be read ({error}); delete it and tune again") from error


def _store(device: torch.device, bucket: Bucket, best: Trial) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"device": name, "versions": _versions(), "entries": {}}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    content["entries"][bucket.key] = {
        "config": asdict(best.config),
        "seconds": best.seconds,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(path, content)
    _stored.cache_clear()


def _round_up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
