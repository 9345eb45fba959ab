"""Which launch configuration a call uses: the one that somebody tuned on this device, else the shipped table's.

Results of :func:`.autotune.tune` lie in the user's cache directory. A file belongs to one device name and one set of
versions, so that a new compiler starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...device import cache_dir
from ...errors import KernelError
from ...files import write_json
from ...layout import TokenLayout
from ...types import Precision
from ...version import __version__
from .configs import Config, arch_of, choose, for_skipping, kind_of

__all__ = ["Bucket", "config_for", "store", "tuned"]


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


def config_for(q: torch.Tensor, layout: TokenLayout, precision: Precision, *, skip: bool = False) -> Config:
    """The configuration for q [B,S,H,D] on its device."""
    config = tuned(q.dtype, precision, q.shape[-1], layout, q.device)
    if config is None:
        block_tokens = int(layout.block_sizes.max())
        config = choose(arch_of(q.device), kind_of(q.dtype, precision), q.shape[-1], block_tokens)
    return for_skipping(config) if skip else config


def tuned(
    dtype: torch.dtype, precision: Precision, head_dim: int, layout: TokenLayout, device: torch.device
) -> Config | None:
    """The stored configuration for such a call on this device, or ``None``."""
    if device.type != "cuda":
        return None
    found = _stored(_path(torch.cuda.get_device_name(device)))
    return found.get(Bucket.of(dtype, precision, head_dim, layout).key)


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


def store(device: torch.device, bucket: Bucket, config: Config, seconds: float) -> None:
    """Keeps ``config``, which took so many seconds, for calls of this bucket on this device.

    Raises:
        OutputError: if it cannot be written.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"device": name, "versions": _versions(), "entries": {}}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    content["entries"][bucket.key] = {
        "config": asdict(config),
        "seconds": seconds,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(path, content)
    _stored.cache_clear()


def _round_up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
