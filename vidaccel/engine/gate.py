"""The way into a forward pass of a patched transformer, and out of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PatchError, StrictError
from ..types import VideoGrid
from .attachment import Attachment, NotPickled
from .capture import refuse_capture
from .context import ForwardContext, PatchedTransformer
from .handles import GATES
from .noise_level import noise_level, why_doubtful
from .ops import enter, leave
from .parallel import Ranks
from .pipeline_call import PipelineCall, is_going_on, pipeline_call
from .runs import DenoisingRun
from .session import Session

__all__ = ["ForwardGate", "GuidancePasses"]


class GuidancePasses:
    """The ``cache_context`` blocks that are open in each thread: the only place where a pipeline names its passes."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def _open(self) -> list[tuple[str, int | None]]:
        return self._thread.__dict__.setdefault("open", [])  # type: ignore[no-any-return]

    @property
    def current(self) -> tuple[str | None, int | None]:
        """Name and step of the innermost block."""
        return self._open[-1] if self._open else (None, None)

    @contextmanager
    def block(self, name: str, step: int | None) -> Iterator[None]:
        """A block of this thread."""
        self._open.append((name, step))
        try:
            yield
        finally:
            self._open.pop()


class ForwardGate(NotPickled):
    """Opens a context for each forward pass of one transformer, and closes it.

    Args:
        attachment: of the transformer.
        transformer: the same for the engine.
    """

    def __init__(self, attachment: Attachment, transformer: PatchedTransformer) -> None:
        self.session: Session = attachment.session
        self.transformer = transformer
        self.passes = GuidancePasses()
        #: The processes that share the sequence, asked in every pass; one sentence if it cannot run sparse with them.
        self.ranks: Callable[[nn.Module], Ranks | str | None] = lambda model: None
        #: Whether every layer of the block stack is patched, so that it takes tokens in layout order.
        self.all_ours = True
        #: Whether the plan wants to see the outputs.
        self.notes_output = False
        #: What the last of entering and leaving gave, in a compiled graph; ``None`` outside one.
        self.token: torch.Tensor | None = None
        #: Which hooks of ours the transformer has, for compiled graphs; ``None`` until it has them.
        self.hooks: str | None = None
        self.handle = GATES.new(self)
        self._attachment = weakref.ref(attachment)
        self._last: tuple[weakref.ref[DenoisingRun], weakref.ref[PipelineCall] | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardGate:
        return self  # a copy of the model drops it

    @property
    def scheduler(self) -> Any:
        """That of the pipeline that runs, or of the one that was patched; ``None`` if neither is known."""
        attachment = None if torch.compiler.is_compiling() else self._attachment()
        call = None if attachment is None else pipeline_call(attachment.model)
        return getattr(self.session.pipe if call is None else call.pipeline, "scheduler", None)

    @property
    def context(self) -> ForwardContext | None:
        """The pass that runs in this thread, or ``None`` outside of one."""
        return self.transformer.context

    def enter(self, level: torch.Tensor | float, grid: VideoGrid | str, tiled: bool, before: int | None) -> None:
        """Starts a forward pass; other arguments as :meth:`.session.Session.enter` has them.

        Args:
            level: the timestep, see :mod:`.noise_level`.

        Raises:
            PatchError: while a CUDA graph is being captured.
            StrictError: in a strict session, if what was patched is not what runs.
        """
        if not torch.compiler.is_compiling():
            self.token = None
            self.entered(level, grid, tiled, before)
            return
        if not isinstance(level, torch.Tensor):
            level = torch.tensor(level, dtype=torch.float64)
        reason, extents = (grid, []) if isinstance(grid, str) else ("", list(grid))
        self.token = enter(level, self.handle, extents, reason, tiled, before)

    def leave(self, output: torch.Tensor | None) -> None:
        """Ends a forward pass.

        Args:
            output: what it gave; ``None`` if it failed.
        """
        if torch.compiler.is_compiling():
            assert output is not None
            self.token = leave(output, self.handle, self.token)
        else:
            self.left(output)

    def entered(self, level: torch.Tensor | float, grid: VideoGrid | str, tiled: bool, before: int | None) -> None:
        """What :meth:`enter` does when it runs."""
        session, attachment = self.session, self._attachment()
        assert attachment is not None  # it lives in the model
        attachment.threads.add(threading.get_ident())
        if isinstance(level, torch.Tensor):
            refuse_capture(level)
        in_place = self._check_processors(attachment)
        call = pipeline_call(attachment.model)
        run = session.runs.current(call)
        owner = session.pipe if call is None else call.pipeline
        scheduler = getattr(owner, "scheduler", None)
        doubt = why_doubtful(scheduler)
        if doubt is not None and not session.plan.is_dense:
            session.say_once(doubt)
        name, step = self.passes.current
        moment = run.observe(
            noise_level(level, scheduler), self.transformer.name, name=name, step=step, scheduler=scheduler,
            in_order=self.transformer.separate_guidance, own_loop=call is None,
        )  # fmt: skip
        ranks = self.ranks(attachment.model)
        if isinstance(ranks, str):
            grid, ranks = ranks, None
        # tokens are in raster order when ranks split and gather them; each layer has all of them after its exchange
        tiled = tiled and ranks is None and self.all_ours and in_place
        session.enter(self.transformer, moment, run, grid, tiled=tiled, before=before, ranks=ranks)

    def left(self, output: torch.Tensor | None) -> None:
        """What :meth:`leave` does when it runs."""
        context, self.transformer.context = self.context, None
        attachment = self._attachment()
        if attachment is not None:
            attachment.threads.discard(threading.get_ident())
        if context is not None and output is not None and self.notes_output:
            context.run.curvature(self.transformer.name, context.moment).note(output)

    def _check_processors(self, attachment: Attachment) -> bool:
        """Whether all processors of ours are in place; says which are not.

        Raises:
            StrictError: in a strict session, if one is not.
        """
        in_place = True
        for module, reason in attachment.replaced():
            if self.session.strict:
                raise StrictError(f"{module}: {reason}")
            self.session.say_once(f"{module}: {reason}")
            in_place = False
        return in_place

    def begin_cache(self) -> None:
        """Where a step cache of diffusers is on, whose state lies on the model, begins it anew with each run.

        The pipelines reset it when they end, but not when they are interrupted. To be called where a pass is named, not
        in it: a reset forgets the name.

        Raises:
            PatchError: if another run on this model goes on, because the two would mix.
        """
        attachment = self._attachment()
        assert attachment is not None  # it lives in the model
        model: Any = attachment.model
        call = pipeline_call(model)
        run = self.session.runs.current(call)
        before, self._last = self._last, (weakref.ref(run), None if call is None else weakref.ref(call))
        if not getattr(model, "is_cache_enabled", False):
            return
        of = None if before is None or before[1] is None else before[1]()
        if attachment.runs_elsewhere or (of is not None and of is not call and is_going_on(of)):
            raise PatchError(
                f"two runs at once on one {type(model).__name__} would mix in its step cache, whose state lies on the"
                " model; run one after the other, give each a transformer of its own, or leave the cache out"
            )
        if before is not None and before[0]() is not run:
            model._reset_stateful_cache()
