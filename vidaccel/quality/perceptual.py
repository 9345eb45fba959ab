"""LPIPS, where its network is already on this machine; nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError
from .metrics import check_same_size

__all__ = ["lpips", "why_no_lpips"]

_CHUNK = 8  # frames at a time
_MIN_SIDE = 64  # below this AlexNet's last maps are too small to be a measure


def why_no_lpips(height: int | None = None, width: int | None = None) -> str | None:
    """Why LPIPS cannot be measured here, with the way to change that; ``None`` if it can.

    Args:
        height, width: of the frames, if they are known; small frames are refused.
    """
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision, which has its network, is not installed; pip install torchvision"
    try:
        path, url = _weights()
    except (ImportError, RuntimeError, OSError) as error:  # made for another torch: it fails in its own ways
        return f"torchvision is installed but cannot be imported ({error}); install the release that fits this torch"
    if not path.is_file():
        return f"AlexNet's weights are not on this machine; download {url} to {path}"
    if height is not None and width is not None and min(height, width) < _MIN_SIDE:
        return f"it needs frames of at least {_MIN_SIDE} pixels a side, not {width}x{height}"
    return None


def lpips(video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Learned perceptual distance (Zhang et al. 2018, AlexNet), mean over frames; 0 if identical.

    Args:
        video, reference: [T, H, W, 3] uint8, H and W at least 64.

    Raises:
        ConfigError: the videos differ in shape, or `why_no_lpips` has a reason.
    """
    check_same_size(video, reference)
    reason = why_no_lpips(*reference.shape[1:3])
    if reason is not None:
        raise ConfigError(f"LPIPS cannot be measured: {reason}")
    metric = _network()
    metric.reset()
    with torch.inference_mode():
        for start in range(0, len(video), _CHUNK):
            metric.update(*(_images(clip[start : start + _CHUNK]) for clip in (video, reference)))
        return float(metric.compute())


def _images(frames: NDArray[np.uint8]) -> torch.Tensor:
    """[N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@lru_cache(maxsize=1)
def _network() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="mean", normalize=False)


def _weights() -> tuple[Path, str]:
    """Where torchvision looks for AlexNet's weights before it downloads them, and from where it would."""
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name, url
