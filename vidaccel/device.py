"""What this machine can run. The only module that reads environment variables."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .version import __version__

if TYPE_CHECKING:
    import torch

__all__ = [
    "PACKAGES",
    "DeviceInfo",
    "GpuInfo",
    "cache_dir",
    "cpu_bf16_is_fast",
    "cpu_name",
    "default_dtype",
    "device_info",
    "find_device",
    "has_cpp_compiler",
]

#: The packages whose versions matter to a run.
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "torchao",
    "safetensors",
    "numpy",
    "opencv-python-headless",
    "imageio-ffmpeg",
)

#: The variables that change how a run goes; shown by ``vidaccel doctor``, read for nothing else.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TRITON_CACHE_DIR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)

# Linux's names for instructions that multiply bf16 matrices: x86 (AVX-512 and AMX), then ARM
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@dataclass(frozen=True)
class GpuInfo:
    """One CUDA device.

    Args:
        name: as the driver calls it.
        capability: compute capability, for example (9, 0).
        memory_gib: all of its memory.
    """

    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class DeviceInfo:
    """What this machine is and has.

    Args:
        vidaccel: version of this package.
        python: version of Python.
        system: operating system and architecture.
        packages: (name, version) of :data:`PACKAGES`; the version is ``None`` where it is not installed.
        cpu: name of the processor.
        cores: cores this process may use.
        memory_gib: main memory, ``None`` where the system does not say.
        cpu_bf16: whether the CPU multiplies bf16 matrices in hardware.
        gpus: the CUDA devices.
        environment: (name, value) of the variables that are set and matter.
    """

    vidaccel: str
    python: str
    system: str
    packages: tuple[tuple[str, str | None], ...]
    cpu: str
    cores: int
    memory_gib: float | None
    cpu_bf16: bool
    gpus: tuple[GpuInfo, ...]
    environment: tuple[tuple[str, str], ...]

    @property
    def default_device(self) -> str:
        """``"cuda"`` if there is a CUDA device, else ``"cpu"``."""
        return "cuda" if self.gpus else "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        data["packages"], data["environment"] = dict(self.packages), dict(self.environment)
        for gpu in data["gpus"]:
            gpu["capability"] = list(gpu["capability"])
        data["gpus"] = list(data["gpus"])
        return data


def device_info(environ: Mapping[str, str] | None = None) -> DeviceInfo:
    """Looks at this machine; imports torch to ask for CUDA devices.

    Args:
        environ: the environment variables, by default those of this process.
    """
    found = os.environ if environ is None else environ
    return DeviceInfo(
        vidaccel=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=tuple((name, _version(name)) for name in PACKAGES),
        cpu=cpu_name(),
        cores=_cores(),
        memory_gib=main_memory_gib(),
        cpu_bf16=cpu_bf16_is_fast(),
        gpus=_gpus(),
        environment=tuple((name, found[name]) for name in _VARIABLES if name in found),
    )


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The folder for what vidaccel measured on this machine; it may not exist yet.

    ``$XDG_CACHE_HOME/vidaccel``, by default ``~/.cache/vidaccel``; a relative path in the variable is not valid and
    not used (XDG base directory specification).

    Args:
        environ: the environment variables, by default those of this process.
    """
    found = (os.environ if environ is None else environ).get("XDG_CACHE_HOME", "")
    base = Path(found) if found and Path(found).is_absolute() else Path.home() / ".cache"
    return base / "vidaccel"


def find_device(name: str) -> torch.device:
    """The device of that name, which torch can use here.

    Raises:
        ConfigError: if it cannot; the message lists those that it can.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}; here are {', '.join(_usable())}") from None
    try:
        if device.type == "meta":  # it has shapes and no numbers
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):  # torch's own words are many lines
        raise ConfigError(f"torch cannot use the device {name!r} here; it can use {', '.join(_usable())}") from None
    return device


def _usable() -> list[str]:
    import torch

    others = [kind for kind in ("mps", "xpu") if getattr(torch, kind).is_available()]
    return ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count())), *others]


@cache
def cpu_bf16_is_fast() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; ``False`` where the system does not say."""
    return not _BF16_FLAGS.isdisjoint(_cpu_fields().get("flags", "").split())


@cache
def has_cpp_compiler() -> bool:
    """Whether torch finds a C++ compiler, with which it compiles for a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def default_dtype(device: str | torch.device) -> torch.dtype:
    """The dtype to load a model in.

    bf16 on accelerators, but fp16 on CUDA devices before Ampere, which have no bf16; on a CPU fp32 unless it has
    bf16 instructions, because bf16 matrix products are about ten times slower without.

    Raises:
        ConfigError: if there is no such device.
    """
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"there is no device {str(device)!r}; give cpu, cuda, cuda:0 or another device") from None
    if kind.type == "cpu":
        return torch.bfloat16 if cpu_bf16_is_fast() else torch.float32
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"the device {device} was asked for, but torch finds no CUDA device; give cpu")
        return torch.bfloat16 if torch.cuda.get_device_capability(kind) >= (8, 0) else torch.float16
    return torch.bfloat16


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[GpuInfo, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(GpuInfo(p.name, (p.major, p.minor), p.total_memory / 2**30) for p in found)


@cache
def _cpu_fields() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo, keys in lower case; empty on other systems than Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in text.split("\n\n")[0].splitlines())
    fields = {key.strip().lower(): value.strip() for key, value in pairs}
    if "features" in fields:  # what ARM calls its flags
        fields.setdefault("flags", fields["features"])
    return fields


def cpu_name() -> str:
    return _cpu_fields().get("model name") or platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    if sys.platform == "linux":  # a container or taskset may leave fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main_memory_gib() -> float | None:
    """Main memory of this machine, ``None`` where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return None
