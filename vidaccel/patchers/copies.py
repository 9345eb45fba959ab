"""A copy of a patched transformer is a patched transformer of its own, with a session of its own.

``copy.deepcopy`` asks an object for ``__deepcopy__`` and finds ours on the patched instance. It copies the model
without anything that ``patch`` put there, and patches the copy in the same way. Parts of it that are copied alone (a
block, a processor) come out unpatched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from ..engine.attachment import Attachment, NotPickled
from ..engine.session import Session
from ..errors import PatchError
from .trained import attach, attached

__all__ = ["watch_copies"]

#: ``patch(model, name, session)``: patches a copy as the original was.
Patch = Callable[[nn.Module, str, Session], Attachment]


def watch_copies(attachment: Attachment, patch: Patch) -> None:
    """From now on copies of the model are right. (Pickling is refused by what hangs on it.)

    Args:
        patch: patches a copy.
    """
    attachment.set_attribute(attachment.model, "__deepcopy__", _Copier(attachment, patch))


class _Copier(NotPickled):
    """``__deepcopy__`` of a patched model."""

    def __init__(self, attachment: Attachment, patch: Patch) -> None:
        self._attachment, self._patch = attachment, patch

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        attachment = self._attachment
        session, model = attachment.session, attachment.model
        _check(attachment)
        made = _unpatched(attachment, memo)
        if session.closed:
            return made
        own = session.copied(memo)
        trained = {attachment.name: attached(session, model, attachment.name)}
        copied = self._patch(made, attachment.name, own)
        attach(copied, [site for site in own.sites if site.transformer.name == attachment.name], trained)
        return made


def _check(attachment: Attachment) -> None:
    """Refuses models whose parts would go on using the original.

    Raises:
        PatchError: if there is one.
    """
    reason = attachment.not_copied
    registries = (getattr(module, "_diffusers_hook", None) for module in attachment.model.modules())
    if reason is None and any(registry is not None and registry.hooks for registry in registries):
        reason = "hooks of diffusers (a step cache, offloading of groups, layerwise casting), which call the original"
    if reason is not None:
        raise PatchError(
            f"{attachment.name} cannot be copied as it is, because it has {reason}; copy it before that is switched on"
            " and before it is patched"
        )


def _unpatched(attachment: Attachment, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of the model without anything that ``patch`` put there."""
    model = attachment.model
    reduced: Any = type(model).__reduce_ex__(model, 4)
    make, arguments, state = reduced[:3]
    made: nn.Module = make(*arguments)
    memo[id(model)] = made
    here = {name for module, name in attachment.attributes if module is model}
    made.__setstate__(copy.deepcopy({name: value for name, value in state.items() if name not in here}, memo))
    for handle in attachment.hooks:
        for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref):
            hooks = reference()
            if id(hooks) in memo:
                memo[id(hooks)].pop(handle.id, None)
    for module, name in attachment.attributes:
        if module is not model and id(module) in memo:
            memo[id(module)].__dict__.pop(name, None)
    for module, name in attachment.buffers:
        if id(module) in memo:
            delattr(memo[id(module)], name)
    return made
