"""The opaque operators that a compiled graph sees.

A patched processor calls ``vidaccel::attention`` with a per-layer handle, a one-element CPU tensor. Noise level, policy
and kernel choice happen inside, so that ``torch.compile`` traces one graph for all layers and steps: an int in the
processor, or a schedule read in Python, would recompile for each layer or step.

Where the whole transformer is compiled, the hooks around its blocks are part of the graph too. What they do at run time
is in three more operators, ``vidaccel::enter``, ``vidaccel::reorder`` and ``vidaccel::leave``. A graph knows no order
but that of its data, so entering returns a token that all the others take.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence

import torch

from ..errors import PatchError
from ..types import VideoGrid
from . import attend
from .capture import OPERATOR_TAGS, refuse_capture
from .parallel import Ranks, attend_across
from .session import Session, TransformerState
from .site import AttentionSite

__all__ = ["Entrance", "attention", "attention_of", "handle_for", "passed_by", "reorder"]

_sites: weakref.WeakValueDictionary[int, AttentionSite] = weakref.WeakValueDictionary()
_entrances: weakref.WeakValueDictionary[int, Entrance] = weakref.WeakValueDictionary()
_next = itertools.count()

_GONE = "this {}'s session is gone; unpatch the pipeline and patch it again"


def handle_for(site: AttentionSite) -> torch.Tensor:
    """A new int64 [1] CPU tensor that stands for ``site`` as long as its session lives."""
    number = next(_next)
    _sites[number] = site
    return torch.tensor([number], dtype=torch.int64)


def passed_by(handle: torch.Tensor, reason: str) -> None:
    """Counts a call that goes to the model's own attention, with the reason. Not inside a compiled graph."""
    site = _sites.get(int(handle))
    if site is not None:
        attend.passed_by(site, reason)


class Entrance:
    """The way into one patched transformer, and out of it.

    Args:
        session: of the pipeline.
        state: what the forward passes of this transformer set.
        separate_guidance: see :meth:`.clock.Clock.tick`.
    """

    def __init__(self, session: Session, state: TransformerState, *, separate_guidance: bool) -> None:
        self.session = session
        self.state = state
        self.separate_guidance = separate_guidance
        #: (name, step) of the ``cache_context`` blocks that are open, innermost last.
        self.context: list[tuple[str, int | None]] = []
        #: The processes that share the sequence, asked in every pass; one sentence if it cannot run sparse with them.
        self.ranks: Callable[[], Ranks | str | None] = lambda: None
        #: What the last of entering and leaving gave, in a compiled graph; ``None`` outside one.
        self.token: torch.Tensor | None = None
        #: Which hooks of ours the transformer has, for compiled graphs; ``None`` until it has them.
        self.hooks: str | None = None
        number = next(_next)
        _entrances[number] = self
        self.handle = torch.tensor([number], dtype=torch.int64)

    def enter(self, level: torch.Tensor | float, grid: VideoGrid | str, tiled: bool, before: int | None) -> None:
        """Starts a forward pass; arguments as :meth:`.clock.Clock.tick` and :meth:`.session.Session.enter` have them.

        Raises:
            PatchError: while a CUDA graph is being captured.
        """
        if not torch.compiler.is_compiling():
            self.token = None
            self.entered(level, grid, tiled, before)
            return
        if not isinstance(level, torch.Tensor):
            level = torch.tensor(level, dtype=torch.float64)
        reason, extents = (grid, []) if isinstance(grid, str) else ("", list(grid))
        self.token = _enter(level, self.handle, extents, reason, tiled, before)

    def leave(self, output: torch.Tensor) -> None:
        """Ends a forward pass whose output the plan wants to see."""
        if torch.compiler.is_compiling():
            self.token = _leave(output, self.handle, self.token)
        else:
            self.left(output)

    def entered(self, level: torch.Tensor | float, grid: VideoGrid | str, tiled: bool, before: int | None) -> None:
        """What :meth:`enter` does when it runs."""
        if isinstance(level, torch.Tensor):
            refuse_capture(level)
        branch, step = self.context[-1] if self.context else (None, None)
        moment = self.session.clock.tick(
            level, context=branch, context_step=step, separate_guidance=self.separate_guidance
        )
        ranks = self.ranks()
        if isinstance(ranks, str):
            grid, ranks = ranks, None
        # tokens are in raster order when ranks split and gather them; each layer has all of them after its exchange
        tiled = tiled and ranks is None
        self.session.enter(self.state, moment, grid, tiled=tiled, before=before, ranks=ranks)

    def left(self, output: torch.Tensor) -> None:
        """What :meth:`leave` does when it runs."""
        if self.state.moment is not None:
            self.state.trajectory.note(self.state.moment, output)


def attention_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention [B, S, H, D] by the plan of the session behind ``handle``; ``hidden`` [B, S, C] is its input.

    ``after`` is the token of the pass, where one graph holds both.

    Raises:
        PatchError: if that session is closed, or while a CUDA graph is being captured.
    """
    site = _sites.get(int(handle))
    if site is None:
        raise PatchError(_GONE.format("attention layer"))
    refuse_capture(q)
    ranks = site.state.ranks
    if ranks is not None:
        return attend_across(site, ranks, q, k, v, mask, hidden).contiguous()
    return attend.attend(site, q, k, v, mask, hidden).contiguous()


#: The operator a graph sees; :func:`attention_of` is what it runs.
attention = torch.library.custom_op("vidaccel::attention", mutates_args=(), **OPERATOR_TAGS)(attention_of)


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


def _entrance(handle: torch.Tensor) -> Entrance:
    found = _entrances.get(int(handle))
    if found is None:
        raise PatchError(_GONE.format("transformer"))
    return found


@torch.library.custom_op("vidaccel::enter", mutates_args=(), **OPERATOR_TAGS)
def _enter(
    level: torch.Tensor, handle: torch.Tensor, grid: Sequence[int], reason: str, tiled: bool, before: int | None
) -> torch.Tensor:
    _entrance(handle).entered(level, VideoGrid(*grid) if grid else reason, tiled, before)
    return handle.clone()


@_enter.register_fake
def _(
    level: torch.Tensor, handle: torch.Tensor, grid: Sequence[int], reason: str, tiled: bool, before: int | None
) -> torch.Tensor:
    return torch.empty_like(handle)


@torch.library.custom_op("vidaccel::leave", mutates_args=(), **OPERATOR_TAGS)
def _leave(output: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    _entrance(handle).left(output)
    return handle.clone()


@_leave.register_fake
def _(output: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(handle)


@torch.library.custom_op("vidaccel::reorder", mutates_args=(), **OPERATOR_TAGS)
def reorder(
    x: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None, dim: int, back: bool = False
) -> torch.Tensor:
    """A copy of x with its tokens along ``dim`` in layout order (``back``: in raster order), if the pass wants that."""
    state = _entrance(handle).state
    if not state.tiled:
        return x.clone(memory_format=torch.contiguous_format)
    layout = state.layout(x.device)
    return layout.untile(x, dim) if back else layout.tile(x, dim)


@reorder.register_fake
def _(x: torch.Tensor, handle: torch.Tensor, after: torch.Tensor | None, dim: int, back: bool = False) -> torch.Tensor:
    return x.new_empty(x.shape)
