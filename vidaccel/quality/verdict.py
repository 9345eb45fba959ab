"""What the figures mean, in four words whose limits come from the comparison's own controls.

No number of decibels is good in itself: it depends on the model, the prompt and the size. So the limits are what this
very model and machine do to a video without any plan:

* *indistinguishable*: no further from the dense video than a repetition of the dense run, or than rounding to 8 bits.
* *close*: no further than the same dense run with one denoising step fewer, a change of settings that people accept.
* *visible*: further than that, but still nearer than the video of another prompt.
* *different video*: as far as the video of another prompt from the same seed.

Two figures decide, PSNR (how far the frames are) and flicker (whether they move alike); the worse one counts. Whether a
video is a different one is for PSNR alone.
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
_ROUNDING_PSNR = 20 * math.log10(255)
_ROUNDING_FLICKER = 1.0  # grey levels


@dataclass(frozen=True)
class Band:
    """One word and the limits within which it holds.

    Args:
        name: one of `BANDS`.
        psnr: least PSNR in dB; ``None`` = any.
        flicker: greatest flicker in grey levels; ``None`` = any.
        why: where the limits come from, one sentence.
    """

    name: str
    psnr: float | None
    flicker: float | None
    why: str

    def holds(self, psnr: float, flicker: float | None) -> bool:
        """Whether both figures are within the limits; an unknown flicker is no obstacle."""
        still = self.flicker is None or flicker is None or flicker <= self.flicker
        return (self.psnr is None or psnr >= self.psnr) and still

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def bands_of(
    again: Mapping[str, Any] | None, fewer: Mapping[str, Any] | None, another: Mapping[str, Any] | None
) -> tuple[tuple[Band, ...], str | None]:
    """The bands of a comparison, best first, and why there are none or which is missing (``None`` if all are there).

    Args:
        again, fewer, another: figures (``psnr``, ``flicker``) of the control runs: dense again, one step fewer, and the
            dense video of another prompt; means over prompts, infinite where all are identical. ``None`` = not run.
    """
    if fewer is None:
        return (), "no dense run with one step fewer was made, so there is no scale; use --controls 1 or more"
    least, most = _ROUNDING_PSNR, _ROUNDING_FLICKER
    why = "An error of one grey level, which rounding to 8 bits may cause."
    if again is not None and again["psnr"] < least:
        # a device that does not repeat itself bit by bit: nobody can tell a plan from a repetition
        least, most = again["psnr"], max(most, again["flicker"] or 0.0)
        why = "No further than the same dense run again, on this device."
    found = [Band(BANDS[0], least, most, why)]
    least, most = min(least, fewer["psnr"]), max(most, fewer["flicker"] or 0.0)
    found.append(Band(BANDS[1], least, most, "No further than the dense run with one denoising step fewer."))
    if another is None:
        found.append(Band(BANDS[2], None, None, "Further than the dense run with one denoising step fewer."))
        return tuple(
            found
        ), "with a single prompt there is no other video to tell a visible change from a different one"
    # no limit for flicker here: a restless video of the right thing is not a different one
    least = min(least, another["psnr"])
    found.append(
        Band(BANDS[2], least, None, "Further than one step fewer, but nearer than the dense video of another prompt.")
    )
    found.append(Band(BANDS[3], None, None, "As far as the dense video of another prompt from the same seed."))
    return tuple(found), None


def judge(figures: Mapping[str, Any], bands: Sequence[Band]) -> str | None:
    """The first band that the figures are within, or ``None`` without bands.

    Args:
        figures: ``psnr`` in dB (infinite = identical) and ``flicker`` in grey levels or ``None``.
    """
    if figures.get("psnr") is None:
        return None
    return next((band.name for band in bands if band.holds(figures["psnr"], figures.get("flicker"))), None)


def verdicts(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The verdict on a comparison as plain values: bands, one word a prompt, how many of each, and one for the mean.

    Args:
        summary: means of the figures and of the controls, as `vidaccel.quality.summarise` makes them.
        rows: figures of each prompt.
        names: of the three controls: dense again, one step fewer, another prompt.
    """
    controls = [_means(summary["controls"].get(name)) for name in names]
    bands, missing = bands_of(*controls)
    words = [judge(row, bands) for row in rows]
    return {
        "overall": judge(_means(summary) or {}, bands),
        "prompts": words,
        "counts": {band.name: words.count(band.name) for band in bands},
        "bands": [band.to_dict() for band in bands],
        "missing": missing,
    }


def _means(figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """PSNR and flicker of a summary as numbers; ``None`` where there are none."""
    if figures is None:
        return None
    psnr = figures["psnr"]["mean"]
    if psnr is None and figures["psnr"]["infinite"]:
        psnr = math.inf
    return None if psnr is None else {"psnr": psnr, "flicker": figures.get("flicker", {}).get("mean")}
