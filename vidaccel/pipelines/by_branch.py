"""A state for each pass of guidance, for those of diffusers' caches that keep one a layer."""

from __future__ import annotations

from typing import Any

from diffusers.hooks.hooks import StateManager
from torch import nn

from ..errors import ConfigError

__all__ = ["keep_branches_apart"]


class _ByBranch(StateManager):  # type: ignore[misc]
    """Stands where a hook has its state, and is that of the pass that runs.

    ``cache_context`` tells a :class:`StateManager` the pass by its name (diffusers 0.36) or by an object with one.
    """

    def __init__(self, make: type) -> None:
        super().__init__(make)
        self._make = make
        self._states: dict[str, Any] = {}
        self._branch: str | None = None

    def set_context(self, context: Any) -> None:
        """From now on this pass runs; ``None`` for none."""
        self._branch = getattr(context, "name", context)

    def reset(self, *_: Any, **__: Any) -> None:
        """Forgets all passes."""
        self._states.clear()

    def _current(self) -> Any:
        if self._branch is None:
            raise ConfigError(
                "a step cache was asked for outside cache_context, so it cannot tell the passes of guidance apart; use"
                " another pipeline, or no cache"
            )
        if self._branch not in self._states:
            self._states[self._branch] = self._make()
        return self._states[self._branch]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # its own, not set yet
            raise AttributeError(name)
        return getattr(self._current(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._current(), name, value)


def keep_branches_apart(model: nn.Module) -> None:
    """Gives every layer of a model on which PAB or FasterCache is enabled a state for each pass."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            state = getattr(hook, "state", None)
            if type(state).__name__ in ("PyramidAttentionBroadcastState", "FasterCacheBlockState"):
                hook.state = _ByBranch(type(state))
