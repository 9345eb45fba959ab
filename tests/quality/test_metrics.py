"""PSNR and SSIM against the formulas written out by hand, and the interval against a table's values."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from vidaccel.errors import ConfigError
from vidaccel.quality.metrics import latent_error, mean_interval, psnr, ssim


def clip(seed: int, frames: int = 11, height: int = 24, width: int = 20) -> np.ndarray:
    """Smooth random frames, more than one chunk of them."""
    noise = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return np.stack([cv2.GaussianBlur(frame, (5, 5), 0) for frame in noise])


def test_psnr_is_ten_log_of_the_mean_squared_error() -> None:
    a, b = clip(0), clip(1)
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)


def test_psnr_of_one_grey_level() -> None:
    """A difference of exactly 1 everywhere: 20 log10(255) = 48.13 dB."""
    a = np.full((3, 12, 12, 3), 100, np.uint8)
    assert psnr(a + 1, a) == pytest.approx(20 * math.log10(255), abs=1e-4)


def test_ssim_is_the_published_formula() -> None:
    """Wang et al. 2004 with OpenCV's filter: Gaussian window of 11, sigma 1.5, C1 = (.01 L)^2, C2 = (.03 L)^2.

    Means over frames, channels and all pixels; frames are mirrored at their borders.
    """
    a, b = clip(2), clip(2) // 2 + clip(3) // 4

    def blurred(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT_101)

    values = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        mx, my = blurred(x), blurred(y)
        vx, vy, cov = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-4)
    assert 0.1 < ssim(a, b) < 0.95, "the case must be able to tell formulas apart"


def test_identical_videos() -> None:
    a = clip(4)
    assert psnr(a, a.copy()) == math.inf
    assert ssim(a, a.copy()) == pytest.approx(1.0, abs=1e-6)


def test_long_clips_are_not_weighted_by_chunk() -> None:
    """Nine frames are a chunk of eight and one of one; the last frame counts as much as any other."""
    a = clip(5, frames=9)
    b = a.copy()
    b[8] = 255 - b[8]
    each = [ssim(a[i : i + 1], b[i : i + 1]) for i in range(9)]
    assert ssim(a, b) == pytest.approx(np.mean(each), abs=1e-5)


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(ConfigError, match="11x24x20x3 and 10x24x20x3"):
        psnr(clip(0), clip(0, frames=10))
    with pytest.raises(ConfigError, match="at least 11 pixels"):
        ssim(clip(0, height=8), clip(1, height=8))


def test_interval_of_known_figures() -> None:
    """n = 4, mean 2.5, s = 1.29099, t(.975, 3) = 3.182: half width 2.0540."""
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert interval.mean == 2.5 and interval.count == 4 and interval.infinite == 0
    assert interval.high - interval.mean == pytest.approx(2.0540, abs=1e-3)
    assert interval.mean - interval.low == pytest.approx(2.0540, abs=1e-3)


def test_interval_of_many_figures_nears_the_normal_one() -> None:
    figures = list(np.random.default_rng(0).normal(size=1000))
    interval = mean_interval(figures)
    expected = 1.9623 * np.std(figures, ddof=1) / math.sqrt(1000)  # t(.975, 999)
    assert interval.high - interval.mean == pytest.approx(expected, rel=1e-3)


def test_infinite_figures_are_counted_apart() -> None:
    assert mean_interval([math.inf, 30.0, 32.0]).to_dict() == pytest.approx(
        {"mean": 31.0, "low": 31 - 12.706, "high": 31 + 12.706, "count": 2, "infinite": 1}
    )
    assert mean_interval([math.inf]).to_dict() == {"mean": None, "low": None, "high": None, "count": 0, "infinite": 1}
    assert mean_interval([5.0]).low is None


def test_latent_error_is_relative() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    assert latent_error(exact, exact) == 0
    assert latent_error(exact + torch.tensor([0.0, 1.0]), exact) == pytest.approx(1 / 5)
    assert latent_error(-exact, exact) == pytest.approx(2)
    with pytest.raises(ConfigError, match=r"differ in shape, \[2\] and \[3\]"):
        latent_error(exact, torch.zeros(3))
