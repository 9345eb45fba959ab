"""The systems' tables in Markdown: a block for each precision and density, and who is on the Pareto front."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vidaccel.errors import ConfigError
from vidaccel.quality import mean_interval

from .system_store import AS_IT_IS, Cell, Row

__all__ = ["BEGIN", "END", "Point", "front", "points_of", "put_into", "table", "tables"]

#: What stands around the tables in a document.
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

#: Token pairs over those asked for, from which on a row is no match for the others of its block.
_FAR = 1.2

_FIGURES = (("psnr", 1), ("ssim", 3), ("latent_error", 3))
_TITLES = {AS_IT_IS: "plans as they are", 1.0: "systems without a knob for density"}
_HEAD = ("System", "Density in sparse steps", "Over all steps", "PSNR, dB", "SSIM", "Latent error", "Planning")


@dataclass(frozen=True)
class Point:
    """A system at one setting, or a plan as it is, in the model's own precision; means over prompts.

    Args:
        density: over all steps, dense ones included.
        psnr: in dB.
        plan: whether it is a plan as it is.
        prompts: how many the means are over.
    """

    name: str
    density: float
    psnr: float
    plan: bool
    prompts: int = 1


def tables(rows: Sequence[Row]) -> str:
    """Markdown: a table for each precision and density, and one for plans that were measured as they are."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["aimed"]), []).append(row)
    native = {_pair(row): row for row in rows if row["precision"] == "native"}
    parts = []
    for (precision, aimed), members in sorted(groups.items(), key=lambda item: (_rank(item[0][0]), -item[0][1])):
        title = _TITLES.get(aimed, f"density {aimed:g} in the sparse steps")
        parts.append(f"### {'Native precision' if precision == 'native' else f'With {precision}'}, {title}")
        parts.append(table(members, None if precision == "native" else native))
    if native:
        parts.append(_front_words(rows))
    return "\n\n".join(parts)


def put_into(text: str, made: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """A document with the tables between these marks replaced.

    Raises:
        ConfigError: if a mark is missing.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ConfigError(f"the document has no place for tables; write {marks[0]} and {marks[1]} where they go")
    return f"{before}{begin}\n{made}\n{end}{after}"


def _rank(precision: str) -> tuple[bool, str]:
    return precision != "native", precision


def table(rows: Sequence[Row], native: dict[tuple[object, ...], Row] | None = None) -> str:
    """One block of the table, best mean PSNR first, and behind all others what computes far more than was asked for.

    The last column is the paired difference in PSNR: to the best system that ran all prompts of the block, or where
    ``native`` holds rows of the same systems and prompts in the model's own precision, to those.
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(_name(row), []).append(row)
    order = sorted(by_name, key=lambda name: (_beyond(by_name[name]), -_mean([row["psnr"] for row in by_name[name]])))
    most = max(map(len, by_name.values()))
    first = next(name for name in order if len(by_name[name]) == most)
    best = {(row["prompt"], row["seed"]): row for row in by_name[first]}
    last = "PSNR minus the best, paired" if native is None else "PSNR minus native, paired"
    lines = ["| " + " | ".join((*_HEAD, last)) + " |", "|" + "---|" * (len(_HEAD) + 1)]
    for name in order:
        own = by_name[name]
        cells = [f"`{name}`" + ("" if len(own) == most else f" ({len(own)} of {most} prompts)")]
        cells += [f"{_mean([row[key] for row in own]):.3f}" for key in ("sparse_density", "density")]
        cells += [_interval([row[key] for row in own], digits) for key, digits in _FIGURES]
        shares = [row["planning_seconds"] / row["attention_seconds"] for row in own]
        cells.append(f"{statistics.median(shares):.0%}")
        cells.append(_against(own, best, native) if native is not None or name != first else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"{most} prompt{'s' if most > 1 else ''}.", "", *lines])


def _beyond(own: Sequence[Row]) -> bool:
    """Whether a system has no setting near the density that it was to be measured at, only ones that compute more."""
    aimed = own[0]["aimed"]
    return 0 < aimed < 1 and _mean([row["sparse_density"] for row in own]) > _FAR * aimed


def _against(own: Sequence[Row], best: dict[tuple[str, int], Row], native: dict[tuple[object, ...], Row] | None) -> str:
    apart = []
    for row in own:
        other = best.get((row["prompt"], row["seed"])) if native is None else native.get(_pair(row))
        if other is not None:
            apart.append(_figure(row["psnr"]) - _figure(other["psnr"]))
    return _interval(apart, 2, sign=True) if apart else ""


def _name(row: Row) -> str:
    name = str(row["system"]) if row["compensation"] == "own" else f"{row['system']}, {row['compensation']}"
    return name + (", former setting" if _edition(row) < Cell(row["system"], row["aimed"]).edition else "")


def _edition(row: Row) -> int:
    return int(row.get("edition", 1))


def _pair(row: Row) -> tuple[object, ...]:
    """What a row shares with the same run in another precision."""
    return *(row[name] for name in ("system", "compensation", "aimed", "prompt", "seed")), _edition(row)


def _figure(value: float | str) -> float:
    """A figure of a file; infinite ones are texts there."""
    return float(value)


def _mean(values: Sequence[float | str]) -> float:
    return statistics.fmean(map(_figure, values))


def _interval(values: Sequence[float | str], digits: int, *, sign: bool = False) -> str:
    found = mean_interval([_figure(value) for value in values])
    if found.mean is None:
        return "identical"
    text = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return text if found.low is None else f"{text} ± {found.mean - found.low:.{digits}f}"


def points_of(rows: Sequence[Row]) -> list[Point]:
    """What can be on the front: the cells in the model's own precision."""
    cells: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["precision"] == "native":
            cells.setdefault((_name(row), row["aimed"]), []).append(row)
    return [
        Point(name, _mean([r["density"] for r in own]), _mean([r["psnr"] for r in own]), aimed == AS_IT_IS, len(own))
        for (name, aimed), own in cells.items()
    ]


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in PSNR at the same density or a lower one, sparsest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.density, -p.psnr)):
        if not found or point.psnr > found[-1].psnr:
            found.append(point)
    return found


def _front_words(rows: Sequence[Row]) -> str:
    found = points_of(rows)
    most = max(point.prompts for point in found)
    # prompts differ by more than systems do, so means over fewer of them say nothing here
    points = [point for point in found if point.prompts == most]
    singles = front([point for point in points if not point.plan])
    listed = ", ".join(f"`{p.name}` {p.density:.3f} / {p.psnr:.1f} dB" for p in singles)
    counted = "" if len(points) == len(found) else f" that ran all {most} prompts"
    lines = [f"Pareto front of the single systems{counted}, density over all steps / PSNR: {listed}."]
    for plan in (point for point in points if point.plan):
        better = [p for p in singles if p.density <= plan.density and p.psnr > plan.psnr]
        place = f"below `{better[-1].name}` at {better[-1].density:.3f}" if better else "on or above it"
        lines.append(f"`{plan.name}`, {plan.density:.3f} / {plan.psnr:.1f} dB, is {place}.")
    return " ".join(lines)
