"""What the figures mean, in four words whose limits come from the comparison's own controls.

No number of decibels is good in itself: it depends on the model, the prompt and the size. So the limits are set by what
this very model and machine do to a video without any plan:

* *indistinguishable*: no further from the dense video than a repetition of the dense run, or than rounding to 8 bits.
* *close*: no further than the same dense run with one denoising step fewer, a change of settings that people accept; or
  a tenth of the error that the video of another prompt has (20 dB), where one step fewer changes almost nothing.
* *visible*: further than that, but still nearer than the video of another prompt.
* *different video*: as far as the video of another prompt from the same seed.

PSNR decides alone. Flicker, latents and perceptual distance stand beside it with their own controls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["BANDS", "Band", "bands_of", "judge", "verdicts"]

#: From the best to the worst.
BANDS = ("indistinguishable", "close", "visible", "different video")

#: A root mean square error of one grey level, 20 log10(255) dB: what rounding to 8 bits may do.
_ROUNDING = 20 * math.log10(255)
_TENTH = 20.0  # dB between an error and a tenth of it


@dataclass(frozen=True)
class Band:
    """One word and the limit down to which it holds.

    Args:
        name: one of `BANDS`.
        psnr: least PSNR in dB; ``None`` = any.
        why: where the limit comes from, one sentence.
    """

    name: str
    psnr: float | None
    why: str

    def holds(self, psnr: float) -> bool:
        """Whether this PSNR is within the limit."""
        return self.psnr is None or psnr >= self.psnr

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def bands_of(again: float | None, fewer: float | None, another: float | None) -> tuple[tuple[Band, ...], str | None]:
    """The bands of a comparison, best first, and why there are none or what they lack (``None`` = nothing).

    Args:
        again, fewer, another: PSNR of the controls in dB: dense again, one step fewer, and the dense video of another
            prompt; means over prompts, infinite where all are identical. ``None`` = not measured.
    """
    if fewer is None:
        return (), "no dense run with one step fewer was made, so there is no scale; use --controls 1 or more"
    # a device that does not repeat itself bit by bit: nobody can tell a plan from a repetition
    restless = again is not None and again < _ROUNDING
    least = again if again is not None and restless else _ROUNDING
    repeated = "No further than the same dense run again, on this device."
    found = [Band(BANDS[0], least, repeated if restless else "An error of one grey level, as by rounding to 8 bits.")]
    tenth = math.inf if another is None else another + _TENTH
    why = "No further than the dense run with one denoising step fewer."
    if tenth < min(fewer, least):
        why = "A tenth of the error of another prompt's video; one denoising step fewer changes even less."
    elif least <= fewer:
        why = "As above: one denoising step fewer changes less than that."
    least = min(least, fewer, tenth)
    found.append(Band(BANDS[1], least, why))
    if another is None:
        found.append(Band(BANDS[2], None, "Further than close."))
        return tuple(
            found
        ), "with a single prompt there is no other video to tell a visible change from a different one"
    found.append(
        Band(BANDS[2], min(least, another), "Further than close, but nearer than another prompt's dense video.")
    )
    found.append(Band(BANDS[3], None, "As far as the dense video of another prompt from the same seed."))
    return tuple(found), None


def judge(psnr: float | None, bands: Sequence[Band]) -> str | None:
    """The first band that holds, or ``None`` without bands or without a figure.

    Args:
        psnr: in dB; infinite = identical.
    """
    if psnr is None:
        return None
    return next((band.name for band in bands if band.holds(psnr)), None)


def verdicts(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The verdict on a comparison as plain values: bands, one word a prompt, how many of each, and one for the mean.

    Args:
        summary: means of the figures and of the controls, as `vidaccel.quality.summarise` makes them.
        rows: figures of each prompt.
        names: of the three controls: dense again, one step fewer, another prompt.
    """
    again, fewer, another = (_mean(summary["controls"].get(name)) for name in names)
    bands, missing = bands_of(again, fewer, another)
    words = [judge(row["psnr"], bands) for row in rows]
    return {
        "overall": judge(_mean(summary), bands),
        "prompts": words,
        "counts": {band.name: words.count(band.name) for band in bands},
        "bands": [band.to_dict() for band in bands],
        "missing": missing,
    }


def _mean(figures: Mapping[str, Any] | None) -> float | None:
    """PSNR of a summary: infinite where all videos are identical, ``None`` where there are none."""
    if figures is None:
        return None
    psnr = figures["psnr"]
    if psnr["mean"] is None:
        return math.inf if psnr["infinite"] else None
    return float(psnr["mean"])
