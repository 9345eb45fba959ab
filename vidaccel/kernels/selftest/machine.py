"""What a verdict depends on: the device, what compiles for it, and the kernels' source."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

from ...device import cpu_name
from ...version import __version__

__all__ = ["machine", "source_digest"]


def machine(device: torch.device) -> dict[str, str]:
    """Name and driver of a device, and the versions of what runs on it."""
    facts = {"torch": str(torch.__version__), "vidaccel": __version__}
    if device.type != "cuda":
        return {"device": cpu_name() if device.type == "cpu" else device.type, **facts}
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": str(driver()),
        "cuda": str(torch.version.cuda),
        **facts,
    }


@cache
def source_digest() -> str:
    """Digest of all that kernels are made of: a change in any of it makes self-tests run again."""
    folder = Path(__file__).parents[1]
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
