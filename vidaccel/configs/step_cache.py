"""Names and settings of diffusers' step caches, as ``--cache`` and plans write them: ``first-block:0.08``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError, did_you_mean

__all__ = ["CACHES", "Cache", "plan_cache"]

#: name -> what the value after the colon is, and its default (``None``: it must be given).
CACHES: dict[str, tuple[str, float | None]] = {
    "first-block": ("largest relative change of the first block's output at which the others are skipped", 0.08),
    "taylorseer": ("steps from one full step to the next; between them outputs are extrapolated", 5),
    "pab": ("steps for which an attention output is used again", 2),
    "faster": ("steps from one attention to the next; between them the last two outputs are extrapolated", 2),
    "sea": ("sum of relative changes of the filtered latents up to which blocks are skipped", 0.25),
    "mag": ("JSON file with the model's list of magnitude ratios, as MagCacheConfig(calibrate=True) prints it", None),
}

#: Those whose value is a threshold; the others count steps, or name a file.
_THRESHOLDS = ("first-block", "sea")


@dataclass(frozen=True)
class Cache:
    """A cache and its setting. Make it with :meth:`parse`.

    Args:
        name: one of :data:`CACHES`.
        value: the number or path, as written.
    """

    name: str
    value: str

    @staticmethod
    def parse(text: str) -> Cache:
        """The cache of ``NAME`` or ``NAME:VALUE``; no file is opened.

        Raises:
            ConfigError: if there is no such cache, or the value is not one it takes.
        """
        name, _, value = text.partition(":")
        if name not in CACHES:
            raise ConfigError(
                f"the cache {text[:80]!r} is not known; valid are {', '.join(CACHES)}, each as NAME:VALUE"
                + did_you_mean(name, CACHES)
            )
        meaning, default = CACHES[name]
        if not value and default is None:
            raise ConfigError(f"the cache {name} needs a value, {name}:VALUE; it is the {meaning}")
        cache = Cache(name, value or f"{default:g}")
        if name != "mag":
            cache._check_number(meaning)
        return cache

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"

    def _check_number(self, meaning: str) -> None:
        try:
            number = float(self.value)
        except ValueError:
            number = math.nan
        whole = self.name not in _THRESHOLDS
        least = 2 if whole else 0
        if not math.isfinite(number) or number < least or (whole and number != int(number)) or number == 0:
            kind = f"a whole number of at least {least}" if whole else "a number above 0"
            raise ConfigError(f"the value of the cache {self.name} is {self.value[:80]!r}; give {kind}: {meaning}")


def plan_cache(text: object) -> str | None:
    """A plan's cache in its one spelling, ``None`` for none.

    Raises:
        ConfigError: if it is no cache, or one that needs another file: opening a plan opens no second file.
    """
    if text is None or text == "none":
        return None
    if not isinstance(text, str):
        raise ConfigError(f"Plan.cache is a {type(text).__name__}; give a text such as first-block:0.08, or None")
    cache = Cache.parse(text)
    if cache.name == "mag":
        raise ConfigError("a plan cannot hold the cache mag, whose ratios are another file; use --cache mag:FILE")
    return str(cache)
