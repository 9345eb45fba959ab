"""All quality figures of one video against another, by name."""

from __future__ import annotations

import math

from ..pipelines.generate import Generation
from .flicker import flicker
from .metrics import latent_error, psnr, ssim
from .perceptual import lpips, why_no_lpips

__all__ = ["FIGURES", "RANGES", "quality_figures"]

#: Names of the figures. ``psnr`` in dB and ``ssim``: more is better. ``flicker`` in grey levels, ``latent_error``
#: (relative L2) and ``lpips``: less is better.
FIGURES = ("psnr", "ssim", "flicker", "latent_error", "lpips")

#: The least and the greatest value of each: mean squared errors of 8 bits are at most 255^2, so no PSNR is below 0 dB.
RANGES = {name: (-1.0, 1.0) if name == "ssim" else (0.0, math.inf) for name in FIGURES}


def quality_figures(run: Generation, reference: Generation) -> dict[str, float | None]:
    """Every figure of `FIGURES` for ``run`` against ``reference``; ``None`` for what cannot be measured here.

    Args:
        run, reference: generations of one size.

    Raises:
        ConfigError: they differ in size, or are too small to compare.
    """
    frames, exact = run.frames, reference.frames
    latents, exact_latents = run.latents, reference.latents
    known = latents is not None and exact_latents is not None
    seen = why_no_lpips(*exact.shape[1:3]) is None
    return {
        "psnr": psnr(frames, exact),
        "ssim": ssim(frames, exact),
        "flicker": flicker(frames, exact),
        "latent_error": latent_error(latents, exact_latents) if known else None,  # type: ignore[arg-type]
        "lpips": lpips(frames, exact) if seen else None,
    }
