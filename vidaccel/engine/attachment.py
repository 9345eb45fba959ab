"""What hangs on a patched transformer: the way back, and what a copy must not take along."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..errors import PatchError
from .unwrap import unwrapped

if TYPE_CHECKING:
    from .session import Session

__all__ = ["ATTACHMENT", "Attachment", "NotPickled", "attachment_of"]

#: Attribute of a patched model. The session hangs on the model itself: a table would keep every model alive for ever.
ATTACHMENT = "_vidaccel"


class NotPickled:
    """Base of what hangs on a patched model: it cannot be written to a file or sent to another process."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PatchError(
            "a patched transformer cannot be pickled (torch.save, spawn, multiprocessing); call vidaccel.unpatch(pipe)"
            " first, and patch again where it is loaded"
        )


class Attachment(NotPickled):
    """What ``patch`` did to one transformer.

    Args:
        session: what it runs by.
        model: the transformer; in it hangs the attachment, so the two live and die together.
        name: the pipeline's name for it.
    """

    def __init__(self, session: Session, model: nn.Module, name: str) -> None:
        self.session = session
        self.model = model
        self.name = name
        #: (qualified name, attention module, our processor) of each patched layer.
        self.processors: list[tuple[str, Any, Any]] = []
        #: Hooks of ours on the model and its modules.
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        #: (module, name) of the attributes of instances that were set on them.
        self.attributes: list[tuple[nn.Module, str]] = []
        #: (module, name) of buffers of ours.
        self.buffers: list[tuple[nn.Module, str]] = []
        #: The threads in which a forward pass of the model goes on.
        self.threads: set[int] = set()
        #: Why the model cannot be copied while it is patched, or ``None``.
        self.not_copied: str | None = None
        self._undo: list[Callable[[], Any]] = []
        self.set_attribute(model, ATTACHMENT, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return self  # a copy of the model drops it

    def on_close(self, undo: Callable[[], Any]) -> None:
        """Registers one step back."""
        self._undo.append(undo)

    def add_hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        """Registers a hook, which undoing removes."""
        self.hooks.append(handle)
        self.on_close(handle.remove)

    def add_buffer(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Registers a buffer that no state dict holds; undoing takes it away."""
        module.register_buffer(name, value, persistent=False)
        self.buffers.append((module, name))
        self.on_close(partial(delattr, module, name))

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of the instance; undoing puts back what was there, unless somebody has set it anew."""
        missing = object()
        before = module.__dict__.get(name, missing)
        module.__dict__[name] = value
        self.attributes.append((module, name))

        def undo() -> None:
            if module.__dict__.get(name) is not value:
                return
            if before is missing:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

        self.on_close(undo)

    @property
    def runs_elsewhere(self) -> bool:
        """Whether a forward pass of the model goes on in another thread."""
        return bool(self.threads - {threading.get_ident()})

    def undo(self) -> None:
        """Undoes every change to the transformer, in reverse order."""
        while self._undo:
            self._undo.pop()()

    def replaced(self) -> Iterator[tuple[str, str]]:
        """(module, reason) of the layers that run another processor than ours by now."""
        for path, module, processor in self.processors:
            if module.processor is not processor:
                yield (
                    f"{self.name}.{path}",
                    f"its processor was replaced after patching by {type(module.processor).__name__}, which runs as it"
                    " is; unpatch the pipeline and patch it again",
                )


def attachment_of(part: Any) -> Attachment | None:
    """The attachment of a patched model, wrapped or not; ``None`` for anything else, and once its session is closed."""
    model = unwrapped(part)
    found = model.__dict__.get(ATTACHMENT) if isinstance(model, nn.Module) else None
    return found if isinstance(found, Attachment) and not found.session.closed else None
