"""All quality figures of one video against another, by name."""

from __future__ import annotations

import math

from ..pipelines.generate import Generation
from .flicker import flicker
from .metrics import latent_error, psnr, ssim
from .perceptual import lpips, why_no_lpips

__all__ = ["BOUNDS", "FIGURES", "quality_figures"]

#: Names of the figures. ``psnr`` in dB and ``ssim``: more is better. ``flicker`` in grey levels, ``latent_error``
#: (relative L2) and ``lpips``: less is better.
FIGURES = ("psnr", "ssim", "flicker", "latent_error", "lpips")


#: What a figure can be at all. Speed-ups and seconds are positive.
BOUNDS: dict[str, tuple[float, float]] = {
    "psnr": (0.0, math.inf),  # of 8-bit pixels, which are 255 apart at most
    "ssim": (-1.0, 1.0),
    "flicker": (0.0, 255.0),
    "latent_error": (0.0, math.inf),
    "lpips": (0.0, math.inf),
    "density": (0.0, 1.0),
    "sparse_density": (0.0, 1.0),
    "speedup": (0.0, math.inf),
    "seconds": (0.0, math.inf),
}


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
