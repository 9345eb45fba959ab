"""What ran sparse over all prompts of a comparison, layer by layer, and what did not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["coverage"]


def coverage(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reports of several runs of one plan as one, with sums over the runs.

    Args:
        reports: `vidaccel.Report.to_dict` of each run; all of one pipeline.

    Returns:
        ``layers`` (transformer, layer, module, calls, sparse_calls, density, seconds, kernels, fallbacks), ``calls``,
        ``sparse_calls``, ``fallbacks`` by reason, ``not_patched`` and ``events``, each said once.
    """
    layers: dict[tuple[str, int], dict[str, Any]] = {}
    for report in reports:
        for layer in report["layers"]:
            key = (layer["transformer"], layer["layer"])
            _add(layers.setdefault(key, _empty(layer)), layer)
    rows = [_finished(layer) for _, layer in sorted(layers.items())]
    return {
        "layers": rows,
        "calls": sum(row["calls"] for row in rows),
        "sparse_calls": sum(row["sparse_calls"] for row in rows),
        "fallbacks": dict(sum((Counter(row["fallbacks"]) for row in rows), Counter[str]())),
        "not_patched": list(
            {entry["module"]: dict(entry) for report in reports for entry in report["not_patched"]}.values()
        ),
        "events": list(dict.fromkeys(event for report in reports for event in report["events"])),
    }


def _empty(layer: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: layer[name] for name in ("transformer", "layer", "module")}
    sums = {"calls": 0, "sparse_calls": 0, "density": 0.0, "seconds": 0.0}
    return {**names, **sums, "kernels": Counter[str](), "fallbacks": Counter[str]()}


def _add(total: dict[str, Any], layer: Mapping[str, Any]) -> None:
    total["density"] += (layer["density"] or 0.0) * layer["calls"]
    for name in ("calls", "sparse_calls", "seconds"):
        total[name] += layer[name]
    for name in ("kernels", "fallbacks"):
        total[name].update(layer[name])


def _finished(total: dict[str, Any]) -> dict[str, Any]:
    """Sums as means where that is what is meant, counters as plain dicts."""
    density = total["density"] / total["calls"] if total["calls"] else None
    return {**total, "density": density, "kernels": dict(total["kernels"]), "fallbacks": dict(total["fallbacks"])}
