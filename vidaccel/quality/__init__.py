"""What a plan costs in quality and gains in time, measured in pairs against the same dense generation."""

from __future__ import annotations

from .compare import (
    ANOTHER_PROMPT,
    CONTROLS,
    DENSE_AGAIN,
    ONE_STEP_FEWER,
    Pair,
    measure_pair,
    measure_pairs,
    run_settings,
    summarise,
    warm_up,
)
from .coverage import coverage
from .figures import FIGURES, quality_figures
from .flicker import flicker
from .metrics import Interval, latent_error, mean_interval, psnr, ssim
from .perceptual import lpips, why_no_lpips
from .plausible import on_prediction
from .verdict import BANDS, Band, bands_of, judge, verdicts

__all__ = [
    "ANOTHER_PROMPT",
    "BANDS",
    "CONTROLS",
    "DENSE_AGAIN",
    "FIGURES",
    "ONE_STEP_FEWER",
    "Band",
    "Interval",
    "Pair",
    "bands_of",
    "coverage",
    "flicker",
    "judge",
    "latent_error",
    "lpips",
    "mean_interval",
    "measure_pair",
    "measure_pairs",
    "on_prediction",
    "psnr",
    "quality_figures",
    "run_settings",
    "ssim",
    "summarise",
    "verdicts",
    "warm_up",
    "why_no_lpips",
]
