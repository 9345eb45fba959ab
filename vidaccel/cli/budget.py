"""The budget options that ``calibrate`` and ``solve`` share, and what they choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..calibration.plans import Choices
    from ..calibration.solve import Solution

#: Heading of the help.
PANEL = "Budget (one of them)"

Speedup = Annotated[
    float | None, typer.Option(min=1.0, help="Whole generation this many times as fast.", rich_help_panel=PANEL)
]
Seconds = Annotated[float | None, typer.Option(min=0.001, help="Seconds of a whole generation.", rich_help_panel=PANEL)]
Density = Annotated[
    float | None,
    typer.Option(min=0.001, max=1.0, help="Kept token pairs over all, dense steps included.", rich_help_panel=PANEL),
]
MaxError = Annotated[
    float | None,
    typer.Option("--max-error", min=0.0, help="Relative L2 error of the final latent.", rich_help_panel=PANEL),
]


Gpu = Annotated[
    str | None,
    typer.Option(
        help="A GPU that is not here, such as H200: predicted times of self-attention alone.", rich_help_panel="Device"
    ),
]


@dataclass(frozen=True)
class Budget:
    """What limits a plan: exactly one figure."""

    kind: Literal["speedup", "seconds", "density", "max-error", "psnr"]
    value: float

    @property
    def by(self) -> Literal["seconds", "density"]:
        """Which cost the choice is made by."""
        return "density" if self.kind == "density" else "seconds"

    def __str__(self) -> str:
        return f"--{self.kind} {self.value:g}"

    def solve(self, choices: Choices) -> Solution:
        """The best choice within the budget (not for psnr, which needs runs).

        Raises:
            ConfigError: if there is none.
        """
        solve = {
            "density": choices.at,
            "max-error": choices.for_error,
            "speedup": choices.for_speedup,
            "seconds": choices.for_seconds,
        }[self.kind]
        try:
            return solve(self.value)
        except ConfigError as error:
            raise ConfigError(f"{self} cannot be kept: {error}") from error


def one_budget(**given: float | None) -> Budget:
    """The one that is given.

    Raises:
        ConfigError: if none or several are given.
    """
    found = [(name.replace("_", "-"), value) for name, value in given.items() if value is not None]
    names = ", ".join("--" + name.replace("_", "-") for name in given)
    if len(found) != 1:
        what = "no budget is given" if not found else "several budgets are given"
        raise ConfigError(f"{what}; give one of {names}")
    kind, value = found[0]
    return Budget(kind, value)  # type: ignore[arg-type]
