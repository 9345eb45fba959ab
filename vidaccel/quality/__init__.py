"""What a plan costs in quality and gains in time, measured in pairs against the same dense generation."""

from __future__ import annotations

from .compare import CONTROLS, DENSE_AGAIN, ONE_STEP_FEWER, Pair, measure_pair, measure_pairs, summarise, warm_up
from .metrics import Interval, mean_interval, psnr, ssim

__all__ = [
    "CONTROLS",
    "DENSE_AGAIN",
    "ONE_STEP_FEWER",
    "Interval",
    "Pair",
    "mean_interval",
    "measure_pair",
    "measure_pairs",
    "psnr",
    "ssim",
    "summarise",
    "warm_up",
]
