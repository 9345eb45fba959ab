"""A comparison or a calibration as one HTML file that needs nothing but a browser: no network, no second file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import OutputError
from ..files import atomic_path, check_writable
from .calibration_figures import draw_front, draw_heatmaps, draw_mass, draw_prediction, draw_words
from .clips import Clip
from .figures import draw_pairs, draw_stages, pairs_note
from .svg import Drawing, Drawings
from .words import LABELS, figure, gains, half_width, has_figure, interval, mean_text

__all__ = ["check_page_path", "render_page", "write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_MANY_LAYERS = 12  # tables of more rows are folded


def check_page_path(path: str | Path) -> Path:
    """``path`` if it names an .html file that can be written.

    Raises:
        OutputError: it has another suffix, or cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the page {target} does not end in .html; name it {target.stem}.html")
    return check_writable(target)


def write_page(path: str | Path, result: Mapping[str, Any], clips: Sequence[Clip] = ()) -> None:
    """Write `render_page` to ``path``, whole or not at all.

    Raises:
        OutputError: the file cannot be written, or does not end in .html.
    """
    target = check_page_path(path)
    text = render_page(result, clips)
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render_page(result: Mapping[str, Any], clips: Sequence[Clip] = ()) -> str:
    """The page's HTML. Every section is drawn only if the result has its figures.

    Args:
        result: `vidaccel.quality.summarise` with ``model``, ``machine``, ``command``, ``created``, and ``calibration``
            (``predicted``, ``measured``, ``prediction``, ``rank_correlation``, ``front``, ``chosen``, ``heatmaps``,
            ``mass``, ``notes``, ``caches``) where they are known. A calibration without pairs has no ``prompts``.
        clips: videos to show, in the order of the prompts; may be fewer than the prompts.
    """
    drawings = Drawings()
    pairs = bool(result.get("prompts"))
    calibration = result.get("calibration")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, interval=interval, half_width=half_width, mean_text=mean_text)
    return environment.get_template("page.html").render(
        result=result,
        prompts=result.get("prompts") or [],
        title=_title(result),
        facts=_facts(result) if pairs else [],
        conclusions=gains(result) if pairs else [],
        clips=clips,
        columns=_columns(result) if pairs else [],
        pairs=draw_pairs(drawings, result) if pairs else [],
        pairs_note=pairs_note(result) if pairs else "",
        stages=draw_stages(drawings, result["summary"]["seconds"]) if pairs else None,
        coverage=result.get("coverage"),
        fold=len(result["coverage"]["layers"]) > _MANY_LAYERS if result.get("coverage") else False,
        calibration=calibration,
        calibrated=_calibrated(drawings, calibration) if calibration else [],
        totals=_totals(calibration, result.get("summary") or {}) if calibration else [],
        stepping=_stepping(calibration["caches"]) if calibration and "caches" in calibration else [],
        linears=_linears(calibration.get("linears") or []) if calibration else [],
        environment=_environment(result),
    )


def _title(result: Mapping[str, Any]) -> str:
    return f"{'Calibration: ' if result.get('calibration') else ''}plan {result['plan']} against dense"


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(name, value, lines to read it by) of what matters most."""
    summary = result["summary"]
    limits = ["of the whole call"]
    if (most := summary["most_by_attention"]) is not None:
        limits.append(f"attention alone: at most {most:.2f}×")
    facts = [("speed-up", interval(summary["speedup"]["total"], unit="×"), limits)]
    facts.append(("density", interval(summary["density"], 3), ["kept token pairs,", "dense calls count as 1"]))
    verdict = result.get("verdict")
    if verdict and verdict["overall"]:
        counts = [f"{name}: {number}" for name, number in verdict["counts"].items() if number]
        facts.append(("verdict", verdict["overall"], counts))
    for name, heading, digits in _columns(result):
        controls = [
            f"{control.removeprefix('dense, ')}: {mean_text(figures[name], digits)}"
            for control, figures in summary["controls"].items()
            if name in figures
        ]
        facts.append((heading, interval(summary[name], digits), controls or [LABELS[name][3]]))
    return facts


def _columns(result: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(name, heading, digits) of the figures that this comparison has."""
    return [
        (name, label + unit.replace(" dB", ", dB"), digits)
        for name, (label, digits, unit, _) in LABELS.items()
        if has_figure(result["summary"], name)
    ]


def _calibrated(drawings: Drawings, calibration: Mapping[str, Any]) -> list[tuple[str, Drawing]]:
    """(heading, figure) of what the calibration knows."""
    found: list[tuple[str, Drawing]] = []
    if calibration.get("prediction"):
        drawn = draw_prediction(drawings, calibration["prediction"], calibration.get("rank_correlation"))
        found.append(("Predicted against measured error", drawn))
    if calibration.get("front"):
        found.append(("Error against cost", draw_front(drawings, calibration["front"], calibration.get("chosen"))))
    maps = calibration.get("heatmaps") or {}
    for kind, heading in (("density", "Density"), ("error", "Predicted error")):
        if maps.get(kind):
            found.append((heading, draw_heatmaps(drawings, kind, maps[kind])))
    if maps.get("precision"):
        found.append(("Precision", draw_words(drawings, maps["precision"])))
    if calibration.get("mass"):
        found.append(("Attention mass", draw_mass(drawings, calibration["mass"])))
    return found


def _totals(calibration: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, predicted, measured) as texts; what neither knows is left out."""
    predicted, measured = calibration.get("predicted") or {}, calibration.get("measured") or {}
    after = calibration.get("after_validation") or {}
    error = measured.get("error", (summary.get("latent_error") or {}).get("mean"))
    rows = [
        ("latent error, relative L2", predicted.get("error"), error),
        ("the same, prediction fitted to these runs too", after.get("error"), None),
        ("seconds", predicted.get("seconds"), measured.get("seconds")),
        ("density", predicted.get("density"), measured.get("density")),
    ]
    shown = [(name, _number(a), _number(b)) for name, a, b in rows if a is not None or b is not None]
    if measured.get("psnr"):
        shown.append(("PSNR, dB", "-", interval(measured["psnr"])))
    return shown


def _stepping(caches: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the table of step caches and the best plan beside each."""
    alone = {one["cache"]: one for one in caches["alone"]}
    rows = []
    for pair in caches["pairs"]:
        own, predicted, measured = alone.get(pair["cache"], {}), pair["predicted"], pair["measured"] or {}
        figures = [own.get("error"), own.get("seconds"), own.get("calls"), predicted["error"], measured.get("error")]
        figures += [predicted["seconds"], measured.get("seconds")]
        name = f"{pair['cache']}, chosen" if pair["chosen"] else str(pair["cache"])
        rows.append((name, *map(_number, figures)))
    return rows


def _linears(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of the table of Linears."""
    names = ("relative_error", "latent_error", "native_seconds", "seconds")
    return [
        (row["kind"], row["precision"], f"{row['chosen']} of {row['count']}", *(_number(row[name]) for name in names))
        for row in rows
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _environment(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of the machine and of the settings."""
    machine, settings = result.get("machine") or {}, result.get("settings") or {}
    rows = [("model", str(result.get("model", "-")))]
    for name in ("pipeline", "device", "dtype"):
        if name in settings:
            rows.append((name, str(settings[name])))
    if settings.get("linear"):
        rows.append(("Linears, in the plan's runs", str(settings["linear"])))
    if settings.get("cache"):
        rows.append(("step cache, in the plan's runs", str(settings["cache"])))
    size = settings.get("frames")
    if size:
        rows.append(("video", f"{size['count']} frames of {size['width']}×{size['height']}"))
    rows += [(name, _text(value)) for name, value in (settings.get("arguments") or {}).items()]
    if machine:
        rows.append(("cpu", f"{machine['cpu']}, {machine['cores']} cores"))
        rows.append(("gpu", ", ".join(_gpu(gpu) for gpu in machine["gpus"]) or "none"))
        packages = [f"{name} {version}" for name, version in machine["packages"].items() if version]
        rows.append(("software", ", ".join([f"vidaccel {machine['vidaccel']}, Python {machine['python']}", *packages])))
    return rows


def _gpu(gpu: Mapping[str, Any]) -> str:
    return f"{gpu['name']} ({gpu['memory_gib']:.0f} GiB)"


def _text(value: Any) -> str:
    return "(empty)" if value == "" else str(value)
