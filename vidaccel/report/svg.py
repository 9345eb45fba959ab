"""Figures as inline SVG that takes its colours and its font from the page, so that dark mode needs no second figure."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

__all__ = ["ACCENT", "BAND", "FAINT", "INK", "SECOND", "SERIES", "Drawing", "Drawings"]

# Colours that matplotlib draws with and that become the page's own; no figure uses them for anything else.
INK = "#0a0b01"
FAINT = "#0a0b02"
ACCENT = "#0a0b03"
SECOND = "#0a0b04"
BAND = "#0a0b05"
_VARIABLES = {INK: "--ink", FAINT: "--faint", ACCENT: "--accent", SECOND: "--second", BAND: "--band"}

#: Colours that tell parts of one bar apart on white and on black.
SERIES = ("#4477aa", "#ccbb44", "#228833", "#aa3377", "#888888", "#66ccee", "#ee6677")

_STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, searchable, and in the page's font
    "svg.hashsalt": "vidaccel",  # the same figure gives the same file
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of a page.

    Args:
        svg: the element, safe to put into HTML.
        alt: what it shows, for those who do not see it.
        caption: how to read it.
    """

    svg: Markup
    alt: str
    caption: str


class Drawings:
    """Makes the figures of one page; it numbers them, because ids must be unique in a page."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def draw(self, paint: Callable[[Figure], None], size: tuple[float, float], *, alt: str, caption: str) -> Drawing:
        """The figure that ``paint`` puts on an empty one.

        Args:
            size: width and height in inches; 5.4 wide is the width of a text column.
        """
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure)
            data = io.StringIO()
            figure.savefig(data, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
        return Drawing(Markup(_inline(data.getvalue(), f"f{next(self._numbers)}-", alt)), alt, caption)


def _inline(svg: str, prefix: str, alt: str) -> str:
    """One <svg> element without anything that belongs to a file of its own, its ids made unique by ``prefix``."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}', svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # the height follows from the width, so that a figure shrinks with the page
    head, rest = svg.split(">", 1)
    width = re.search(r'\bwidth="([\d.]+)pt"', head)
    assert width is not None, "matplotlib gives every figure a width in points"
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    shown = Markup.escape(alt)
    head += f' role="img" aria-label="{shown}" style="max-width: {float(width[1]) / 72 * 1.35:.1f}in"'
    return re.sub(r"\n\s*", "\n", f"{head}>{rest}").strip()
