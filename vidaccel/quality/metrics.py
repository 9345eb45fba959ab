"""PSNR and SSIM of two videos, the error of latents, and the mean of paired figures with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ..errors import ConfigError

__all__ = ["Interval", "check_same_size", "latent_error", "mean_interval", "psnr", "ssim"]

_CHUNK = 8  # frames at a time, so that 81 frames of 720p need no gigabytes of floats
_MIN_SIDE = 11  # of SSIM's Gaussian window

# Student's t, 97.5% quantile for 1 to 30 degrees of freedom; any table of statistics has them
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def psnr(video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared error over all frames); ``inf`` if identical.

    Args:
        video, reference: [T, H, W, 3] uint8.

    Raises:
        ConfigError: the videos differ in shape.
    """
    return _measured(PeakSignalNoiseRatio(data_range=255.0), video, reference)


def ssim(video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Structural similarity (Wang et al. 2004; Gaussian window of 11, sigma 1.5), mean over frames; 1 if identical.

    Args:
        video, reference: [T, H, W, 3] uint8, H and W at least 11.

    Raises:
        ConfigError: the videos differ in shape or are too small.
    """
    if min(reference.shape[1:3]) < _MIN_SIDE:
        raise ConfigError(f"SSIM needs frames of at least {_MIN_SIDE} pixels a side, not {_size(reference)}")
    return _measured(StructuralSimilarityIndexMeasure(data_range=255.0), video, reference)


def latent_error(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 of two latents, ||a - b|| / ||b||: 0 if identical, about 1.4 for unrelated ones of equal size.

    It is what the transformer changed, before the VAE hides or spreads it.

    Args:
        latents, reference: tensors of one shape, as the VAE gets them.

    Raises:
        ConfigError: they differ in shape.
    """
    if latents.shape != reference.shape:
        raise ConfigError(
            f"the latents to compare differ in shape, {list(latents.shape)} and {list(reference.shape)};"
            " generate both with the same settings"
        )
    exact = reference.double()
    return float((latents.double() - exact).norm() / exact.norm())


def check_same_size(video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> None:
    """Nothing for two videos of one shape.

    Raises:
        ConfigError: the videos differ in shape.
    """
    if video.shape != reference.shape:
        raise ConfigError(
            f"the videos to compare differ in size, {_size(video)} and {_size(reference)};"
            " generate both with the same settings"
        )


def _measured(metric: Any, video: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    check_same_size(video, reference)
    for start in range(0, len(video), _CHUNK):
        metric.update(*(_images(clip[start : start + _CHUNK]) for clip in (video, reference)))
    return float(metric.compute())


def _images(frames: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()


def _size(frames: NDArray[np.uint8]) -> str:
    return "x".join(str(extent) for extent in frames.shape)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% confidence interval (Student's t, so it is wide where figures are few).

    Args:
        mean: over the finite figures; ``None`` without any, NaN if one of them is.
        low, high: ends of the interval, cut where no such figure can be; ``None`` for fewer than two figures.
        count: finite figures.
        infinite: figures left out because they are infinite (PSNR of identical videos).
    """

    mean: float | None
    low: float | None
    high: float | None
    count: int
    infinite: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def mean_interval(figures: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The mean of ``figures`` and its interval; infinite ones are counted apart, since no mean can hold them.

    Args:
        figures: of one kind.
        within: the least and the greatest value that such a figure can have. Student's t knows of no limits, so an
            interval that goes beyond them is cut there: what is beyond cannot be the mean.
    """
    if any(math.isnan(figure) for figure in figures):
        return Interval(math.nan, None, None, len(figures), 0)  # or a broken run would count as an identical one
    finite = [figure for figure in figures if math.isfinite(figure)]
    infinite = len(figures) - len(finite)
    if not finite:
        return Interval(None, None, None, 0, infinite)
    mean = statistics.fmean(finite)
    if len(finite) == 1:
        return Interval(mean, None, None, 1, infinite)
    degrees = len(finite) - 1
    quantile = _T975[degrees - 1] if degrees <= len(_T975) else 1.96 + 2.5 / degrees  # within .003 of the true one
    half = quantile * statistics.stdev(finite) / math.sqrt(len(finite))
    low, high = max(mean - half, within[0]), min(mean + half, within[1])
    return Interval(mean, low, high, len(finite), infinite)
