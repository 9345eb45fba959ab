"""What a pipeline's call takes: names, defaults and types, of classic and of modular pipelines alike."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Argument", "arguments_of", "default_of", "takes_anything", "takes_pictures"]

_NONE = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """One argument of a pipeline's call.

    Args:
        default: its default, ``None`` if it has none.
        required: whether the call cannot be made without it.
        hint: its type as annotated, evaluated where that is possible; ``None`` if it has none.
    """

    default: Any
    required: bool
    hint: Any


def arguments_of(pipe: Any) -> Mapping[str, Argument]:
    """The arguments of a pipeline's call, or of a pipeline class's, by name."""
    blocks = getattr(pipe, "blocks", None)
    if blocks is not None and not isinstance(pipe, type):  # a modular pipeline: its blocks say what they take
        # other inputs may be required by one branch of the blocks and made by another
        return {
            given.name: Argument(given.default, given.required and takes_pictures(given.type_hint), given.type_hint)
            for given in blocks.inputs
            if given.name is not None
        }
    return {
        name: Argument(None if p.default is _NONE else p.default, p.default is _NONE, _hint(p))
        for name, p in _signature(pipe).parameters.items()
        if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def takes_anything(pipe: Any) -> bool:
    """Whether the call has ``**kwargs``, so that no name is wrong by itself."""
    if getattr(pipe, "blocks", None) is not None and not isinstance(pipe, type):
        return any(given.name is None for given in pipe.blocks.inputs)
    return any(p.kind is p.VAR_KEYWORD for p in _signature(pipe).parameters.values())


def takes_pictures(hint: Any) -> bool:
    """Whether an argument of this type is a picture, or made of pictures."""
    return "PIL.Image" in repr(hint)


def default_of(pipe: Any, name: str) -> Any:
    """The default of an argument; ``None`` if there is none, or no such argument."""
    found = arguments_of(pipe).get(name)
    return None if found is None else found.default


def _signature(pipe: Any) -> inspect.Signature:
    cls = pipe if isinstance(pipe, type) else type(pipe)
    return inspect.signature(cls.__call__)


def _hint(parameter: inspect.Parameter) -> Any:
    # diffusers does not postpone annotations; text is left where another pipeline's author does
    return None if parameter.annotation is _NONE or isinstance(parameter.annotation, str) else parameter.annotation
