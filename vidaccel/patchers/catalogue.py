"""What vidaccel does with every video pipeline, read off the families: for the CLI and ``docs/MODELS.md``."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any

from .dense_only import DENSE_ONLY
from .registry import families

__all__ = ["Row", "catalogue", "count", "markdown", "video_pipelines"]


@dataclass(frozen=True)
class Row:
    """One family, or one kind of model that stays dense.

    Args:
        family: its name.
        pipelines: class names in diffusers.
        transformers: class names of the denoisers.
        patched: the modules whose self-attention is replaced; empty if none.
        token_order: where the video sits in the sequence.
        once: whether tokens are reordered once for a forward pass; else in every layer.
        stays_dense: what is not touched and why, a sentence each.
    """

    family: str
    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]
    patched: tuple[str, ...]
    token_order: str
    once: bool
    stays_dense: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def catalogue() -> tuple[Row, ...]:
    """All families, then all kinds that stay dense."""
    from .base import Family

    patched = [
        Row(
            family.name,
            family.pipelines,
            family.transformers,
            family.layers,
            family.token_order,
            type(family).tiles_once is not Family.tiles_once,
            tuple(f"{module}: {reason}" for module, reason in family.dense),
        )
        for family in families()
    ]
    dense = [Row(kind.name, kind.pipelines, kind.models, (), "", False, (kind.reason,)) for kind in DENSE_ONLY]
    return (*patched, *dense)


def video_pipelines() -> tuple[str, ...]:
    """Names of all pipelines of the installed diffusers that make or change videos. Imports all of them: slow.

    By signature or name, so a new one that nobody here has heard of is found too.
    """
    import diffusers

    found = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None)
        if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
            continue
        takes_frames = "num_frames" in inspect.signature(cls.__call__).parameters if callable(cls) else False
        if takes_frames or "video" in name.lower() or "video" in cls.__module__.rsplit(".", 2)[-2]:
            found.append(name)
    return tuple(found)


def count() -> dict[str, list[str]]:
    """The installed diffusers' video pipelines: ``patched``, ``dense`` (known, with a reason) and ``unknown``."""
    rows = catalogue()
    patched = {name for row in rows if row.patched for name in row.pipelines}
    dense = {name for row in rows if not row.patched for name in row.pipelines}
    found: dict[str, list[str]] = {"patched": [], "dense": [], "unknown": []}
    for name in video_pipelines():
        kind = "patched" if name in patched else "dense" if name in dense else "unknown"
        found[kind].append(name)
    return found


def markdown() -> str:
    """The catalogue as the text of ``docs/MODELS.md``."""
    lines = [
        "# Models",
        "",
        "Written by `vidaccel models --markdown`, kept true by a test. *Reordered*: whether the video's tokens are put",
        "into tiles once for a forward pass or in every layer. Text and other tokens in a joint sequence attend",
        "everything and are always attended.",
        "",
        "| family | pipelines | patched | sequence | reordered | stays dense |",
        "|---|---|---|---|---|---|",
    ]
    rows = catalogue()
    for row in rows:
        if row.patched:
            cells = (row.family, _names(row.pipelines), _names(row.patched), row.token_order)
            once = "once" if row.once else "in every layer"
            lines.append(f"| {' | '.join(cells)} | {once} | {'; '.join(_code(text) for text in row.stays_dense)} |")
    lines += ["", "Known and left dense, because:", "", "| kind | pipelines | models | reason |", "|---|---|---|---|"]
    for row in rows:
        if not row.patched:
            lines.append(
                f"| {row.family} | {_names(row.pipelines)} | {_names(row.transformers)} | {row.stays_dense[0]} |"
            )
    lines += [
        "",
        "Any other transformer: `vidaccel.patchers.registry.register_family` with a family of your own",
        "(`examples/custom_family.py`). A pipeline that holds no transformer known here is refused with an error.",
    ]
    return "\n".join(lines) + "\n"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def _code(text: str) -> str:
    module, _, reason = text.partition(": ")
    return f"`{module}`: {reason}"
