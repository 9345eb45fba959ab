"""Which families exist, and which one a model belongs to."""

from __future__ import annotations

from ..errors import PatchError
from .allegro import AllegroFamily
from .anyflow import AnyFlowFamily
from .base import Family
from .cogvideox import CogVideoXFamily
from .cosmos import CosmosFamily
from .dense_only import DENSE_ONLY, DenseOnly
from .easyanimate import EasyAnimateFamily
from .helios import HeliosFamily
from .hunyuan_video import FramepackFamily, HunyuanVideoFamily
from .hunyuan_video15 import HunyuanVideo15Family
from .kandinsky import Kandinsky5Family, Kandinsky6Family
from .ltx import LTX2Family, LTXFamily
from .mochi import MochiFamily
from .motif_video import MotifVideoFamily
from .wan import WanAnimateFamily, WanFamily

__all__ = ["dense_only_of", "families", "family_of", "register_family", "unregister_family"]

_families: list[Family] = [
    WanFamily(),
    WanAnimateFamily(),
    HunyuanVideoFamily(),
    FramepackFamily(),
    HunyuanVideo15Family(),
    MotifVideoFamily(),
    CogVideoXFamily(),
    EasyAnimateFamily(),
    MochiFamily(),
    LTXFamily(),
    LTX2Family(),
    CosmosFamily(),
    AllegroFamily(),
    Kandinsky5Family(),
    Kandinsky6Family(),
    HeliosFamily(),
    AnyFlowFamily(),
]


def families() -> tuple[Family, ...]:
    """All families, user-registered ones first."""
    return tuple(_families)


def family_of(model: object) -> Family | None:
    """The family of a transformer, or ``None`` if no family knows it."""
    return next((family for family in _families if family.matches(model)), None)


def dense_only_of(model: object) -> DenseOnly | None:
    """The kind of a video model that is known and stays dense, or ``None``."""
    return next((kind for kind in DENSE_ONLY if kind.matches(model)), None)


def register_family(family: Family) -> None:
    """Adds a family for your own transformer; it is asked before the built-in ones."""
    _families.insert(0, family)


def unregister_family(family: Family) -> None:
    """Takes a family out again; models that it has patched stay patched.

    Raises:
        PatchError: if it is not registered.
    """
    if family not in _families:
        raise PatchError(
            f"the family {family.name!r} is not registered; pass the object that register_family was given"
        )
    _families.remove(family)
