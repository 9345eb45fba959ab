"""vidaccel makes a diffusers video pipeline faster in one line.

::

    session = vidaccel.patch(pipe)
    video = pipe("a cat surfing").frames[0]
    print(session.report())
    vidaccel.unpatch(pipe)

Importing this package imports neither torch nor diffusers: every name below is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .blockmask import BlockMask
    from .compensation.registry import build_compensation, compensation_names
    from .configs.artifact import load_plan, save_plan
    from .configs.fingerprint import Fingerprint
    from .configs.linear import LinearPlan, LinearRule
    from .configs.pattern_spec import CompensationSpec, PatternSpec
    from .configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
    from .configs.presets import load_preset, preset_names, resolve_plan
    from .device import device_info
    from .engine.guard import Guard
    from .engine.host import Attention, attention, attention_plugin
    from .engine.session import Session
    from .errors import (
        AlreadyPatchedError,
        ConfigError,
        KernelError,
        LayoutError,
        NotPatchedError,
        OutputError,
        PatchError,
        PlanFileError,
        PlanMismatchError,
        StrictError,
        UnsupportedModelError,
        VidaccelError,
        VidaccelWarning,
    )
    from .layout import TokenLayout
    from .patchers.registry import families as models
    from .patterns.registry import build_pattern, pattern_names
    from .pipelines.patch import patch, session_of, unpatch
    from .types import PRECISIONS, Precision, TileShape, VideoGrid

__all__ = [
    "PRECISIONS",
    "AlreadyPatchedError",
    "Attention",
    "BlockMask",
    "CompensationSpec",
    "ConfigError",
    "Fingerprint",
    "Guard",
    "HeadPolicy",
    "KernelError",
    "LayerPolicy",
    "LayoutError",
    "LinearPlan",
    "LinearRule",
    "NotPatchedError",
    "OutputError",
    "PatchError",
    "PatternSpec",
    "Plan",
    "PlanFileError",
    "PlanMismatchError",
    "Precision",
    "Rule",
    "Session",
    "StrictError",
    "TileShape",
    "TokenLayout",
    "UnsupportedModelError",
    "VidaccelError",
    "VidaccelWarning",
    "VideoGrid",
    "__version__",
    "attention",
    "attention_plugin",
    "build_compensation",
    "build_pattern",
    "compensation_names",
    "device_info",
    "load_plan",
    "load_preset",
    "models",
    "patch",
    "pattern_names",
    "preset_names",
    "resolve_plan",
    "save_plan",
    "session_of",
    "unpatch",
]

# module -> names; a name that is called otherwise there is written "name=its name there"
_HOMES = {
    "blockmask": "BlockMask",
    "configs.artifact": "load_plan save_plan",
    "configs.fingerprint": "Fingerprint",
    "compensation": "build_compensation compensation_names",  # the package, as below
    "configs.linear": "LinearPlan LinearRule",
    "configs.pattern_spec": "CompensationSpec PatternSpec",
    "configs.plan": "HeadPolicy LayerPolicy Plan Rule",
    "configs.presets": "load_preset preset_names resolve_plan",
    "device": "device_info",
    "engine.guard": "Guard",
    "engine.host": "Attention attention attention_plugin",
    "engine.session": "Session",
    "errors": (
        "AlreadyPatchedError ConfigError KernelError LayoutError NotPatchedError OutputError PatchError PlanFileError"
        " PlanMismatchError StrictError UnsupportedModelError VidaccelError VidaccelWarning"
    ),
    "layout": "TokenLayout",
    "patchers.registry": "models=families",
    "patterns": "build_pattern pattern_names",  # the package, because importing it registers the patterns
    "pipelines.patch": "patch session_of unpatch",
    "types": "PRECISIONS Precision TileShape VideoGrid",
}
_LAZY = {
    name: (f"{__name__}.{module}", there or name)
    for module, names in _HOMES.items()
    for name, _, there in (entry.partition("=") for entry in names.split())
}

if not TYPE_CHECKING:  # hidden from type checkers, which would take any misspelt name for one of these

    def __getattr__(name: str) -> Any:
        """Fetches a public name from its module when it is first used (PEP 562)."""
        try:
            module, there = _LAZY[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        value = getattr(import_module(module), there)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
