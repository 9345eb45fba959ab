"""One cell of what calibration has seen: candidates and heads of one layer, noise bin and guidance branch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELDS", "Cell", "Floats", "Place", "Sample"]

Floats = NDArray[np.float32]

#: What a cell holds for each candidate and head, [C,H].
FIELDS = ("error", "spread", "cosine", "mass", "density")


@dataclass(frozen=True, order=True)
class Place:
    """Where a cell is.

    Args:
        bin: number of the noise bin, counted from the clean end.
        transformer: name in the pipeline.
        layer: number of the attention layer.
        branch: ``"cond"``, ``"uncond"``, or ``""`` where both are one batch or unknown.
    """

    bin: int
    transformer: str
    layer: int
    branch: str = ""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt's figures in one cell, per query token and candidate: error, cosine, mass and density are [C,H].

    The mass of candidates that were judged by running is not known, and 0 stands for it.
    """

    error: Floats
    cosine: Floats
    mass: Floats
    density: Floats
    energy: Floats


@dataclass(eq=False)
class Cell:
    """Means over prompts of the figures of :class:`Sample`, and the spread of the error.

    Args:
        prompts: how many prompts are in.
        error, cosine, mass, density: [C,H].
        spread: sum of squared deviations of the error from its mean, [C,H].
        energy: [H].
    """

    prompts: int
    error: Floats
    spread: Floats
    cosine: Floats
    mass: Floats
    density: Floats
    energy: Floats

    @staticmethod
    def empty(candidates: int, heads: int) -> Cell:
        """A cell that has seen nothing."""
        each = {name: np.zeros((candidates, heads), np.float32) for name in FIELDS}
        return Cell(prompts=0, energy=np.zeros(heads, np.float32), **each)

    def add(self, sample: Sample) -> None:
        """Takes one more prompt in (Welford's update)."""
        self.prompts += 1
        before = sample.error - self.error
        for name in ("error", "cosine", "mass", "density", "energy"):
            mean = getattr(self, name)
            mean += (getattr(sample, name) - mean) / self.prompts
        self.spread += before * (sample.error - self.error)

    def standard_error(self) -> Floats:
        """Standard error of the mean error, [C,H]; infinite after a single prompt."""
        if self.prompts < 2:
            return np.full_like(self.error, np.inf)
        return np.sqrt(self.spread / (self.prompts - 1) / self.prompts)
