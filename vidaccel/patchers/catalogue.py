"""What vidaccel does with every video pipeline, read off the families: for the CLI and ``docs/MODELS.md``."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from .dense_only import DENSE_ONLY
from .registry import families

__all__ = ["IMAGES", "Row", "catalogue", "count", "markdown", "modular_pipelines", "video_pipelines"]

#: Pipelines that make single images with the model or the tools of a video pipeline.
IMAGES = (
    "Cosmos2TextToImagePipeline",
    "JoyImageEditPipeline",
    "JoyImageEditPlusPipeline",
    "Kandinsky5I2IPipeline",
    "Kandinsky5T2IPipeline",
)


@dataclass(frozen=True)
class Row:
    """One family, or one kind of model that stays dense.

    Args:
        family: its name.
        pipelines: class names in diffusers.
        transformers: class names of the denoisers.
        patched: the modules whose self-attention is replaced; empty if none.
        token_order: where the video sits in the sequence.
        once: whether tokens are reordered once for a forward pass where that is safe; else in every layer.
        stays_dense: what is not touched and why, a sentence each.
        dense_pipelines: those of ``pipelines`` of which nothing runs sparse.
    """

    family: str
    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]
    patched: tuple[str, ...]
    token_order: str
    once: bool
    stays_dense: tuple[str, ...]
    dense_pipelines: tuple[str, ...]

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
            tuple(f"{what}: {reason}" for what, reason in family.dense + family.dense_pipelines),
            tuple(name for name, _ in family.dense_pipelines),
        )
        for family in families()
    ]
    dense = [
        Row(kind.name, kind.pipelines, kind.models, (), "", False, (kind.reason,), kind.pipelines)
        for kind in DENSE_ONLY
    ]
    return (*patched, *dense)


def video_pipelines() -> tuple[str, ...]:
    """Names of all pipelines of the installed diffusers that make or change videos. Imports all of them: slow.

    By signature, name or what their modules use, so a new one that nobody here has heard of is found too.
    """
    import diffusers

    found = []
    for name, cls in _classes()[0].items():
        if not issubclass(cls, diffusers.DiffusionPipeline) or name in IMAGES:
            continue
        takes_frames = "num_frames" in inspect.signature(cls.__call__).parameters if callable(cls) else False
        named = "video" in name.lower() or "video" in cls.__module__.rsplit(".", 2)[-2]
        if takes_frames or named or any(word in _source(cls) for word in ("VideoProcessor", "3DModel")):
            found.append(name)
    return tuple(found)


def modular_pipelines() -> dict[str, tuple[str, ...]]:
    """The installed diffusers' modular pipelines that decode videos, each with its components' class names. Slow."""
    import diffusers

    found = {}
    for name, cls in _classes()[0].items():
        if not issubclass(cls, getattr(diffusers, "ModularPipeline", ())):
            continue
        blocks = getattr(diffusers, getattr(cls, "default_blocks_name", None) or "", None)
        components = blocks().expected_components if blocks is not None else ()
        if any(part.name == "video_processor" for part in components):
            found[name] = tuple(getattr(part.type_hint, "__name__", "") for part in components)
    return found


def count() -> dict[str, list[str]]:
    """The installed diffusers' video pipelines: ``patched``, ``dense`` (known, with a reason) and ``unknown``.

    The same of its modular pipelines, by their transformers, and ``not_importable``: pipelines of any kind that could
    not be looked at.
    """
    rows = catalogue()
    kinds = ("patched", "dense", "unknown")
    found: dict[str, list[str]] = {f"{prefix}{kind}": [] for prefix in ("", "modular_") for kind in kinds}
    dense = {name for row in rows for name in row.dense_pipelines}
    patched = {name for row in rows for name in row.pipelines} - dense
    for name in video_pipelines():
        found["patched" if name in patched else "dense" if name in dense else "unknown"].append(name)
    sparse_models = {name for row in rows if row.patched for name in row.transformers}
    dense_models = {name for row in rows if not row.patched for name in row.transformers}
    for name, parts in modular_pipelines().items():
        kind = "patched" if sparse_models & {*parts} else "dense" if dense_models & {*parts} else "unknown"
        found[f"modular_{kind}"].append(name)
    found["not_importable"] = list(_classes()[1])
    return found


@cache
def _classes() -> tuple[dict[str, type], tuple[str, ...]]:
    """Every class of the installed diffusers by name, and the names of pipelines that cannot be imported."""
    import diffusers

    found, missing = {}, []
    for name in dir(diffusers):
        try:
            value = getattr(diffusers, name, None)
        except (ImportError, RuntimeError):  # diffusers turns the first into the second
            if "Pipeline" in name:
                missing.append(name)
            continue
        if inspect.isclass(value):
            found[name] = value
    return found, tuple(missing)


def _source(cls: type) -> str:
    module = inspect.getmodule(cls)
    return inspect.getsource(module) if module is not None else ""


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
            once = "once where safe" if row.once else "in every layer"
            stays_dense = "; ".join(_code(text) for text in row.stays_dense) or "nothing"
            lines.append(f"| {' | '.join(cells)} | {once} | {stays_dense} |")
    lines += ["", "Known and left dense, because:", "", "| kind | pipelines | models | reason |", "|---|---|---|---|"]
    for row in rows:
        if not row.patched:
            lines.append(
                f"| {row.family} | {_names(row.pipelines)} | {_names(row.transformers)} | {row.stays_dense[0]} |"
            )
    lines += [
        "",
        "Any other transformer: `vidaccel.patchers.registry.register_family` with a family of your own",
        "(`examples/custom_family.py`). A pipeline without a listed transformer is refused with an error.",
    ]
    return "\n".join(lines) + "\n"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def _code(text: str) -> str:
    module, _, reason = text.partition(": ")
    return f"`{module}`: {reason}"
