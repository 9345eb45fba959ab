"""What ``vidaccel.patch`` returns: it owns the clock, the statistics and the undo list.

All mutable state lives here, so two pipelines with different plans do not meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..configs.plan import LayerPolicy, Plan
from ..errors import PlanMismatchError, VidaccelWarning
from ..kernels.contract import Kernel, KernelRequest
from ..layout import TokenLayout
from ..types import Precision, TileShape, VideoGrid
from .clock import Clock, Moment
from .guard import Guard
from .prepare import HeadGroup, HeadShare, prepare
from .sequence import Part, Sequence, padding_of, parts_of
from .site import AttentionSite, DenseAttention, Observer
from .stats import LayerStats, Report
from .trajectory import Trajectory

if TYPE_CHECKING:
    from .parallel import Ranks

__all__ = ["Session", "TransformerState"]


_MAX_GROUPS = 256


@dataclass(eq=False)
class TransformerState:
    """One transformer of the pipeline, and what its current forward pass is about.

    Args:
        name: the pipeline's name for it, ``"transformer"`` or ``"transformer_2"``.
        moment: set on entry of each forward pass.
        grid: token grid of this pass; ``None`` if it cannot run sparse, then ``dense_reason`` says why.
        tile: tile shape the plan asks for, or ``None`` to let the layout choose.
        tiled: whether the block stack sees its tokens in layout order (once per forward), or in raster order, so
            that each layer permutes for itself.
        joint: whether other tokens share the sequence with the video.
        before: how many of them precede it; ``None`` for all.
        ranks: the processes that share the sequence of this pass, if they do.
        padding: what :meth:`parts` found in this pass, by mask.
        trajectory: its outputs of before, if the plan asks for them.
    """

    name: str
    moment: Moment | None = None
    grid: VideoGrid | None = None
    tile: TileShape | None = None
    tiled: bool = False
    dense_reason: str | None = None
    joint: bool = False
    before: int | None = 0
    ranks: Ranks | None = None
    padding: dict[Any, tuple[torch.Tensor, tuple[Part, ...] | str]] = field(default_factory=dict)
    trajectory: Trajectory = field(default_factory=Trajectory)

    def layout(self, device: torch.device) -> TokenLayout:
        """Order of the video's tokens in this pass, on the device where it is needed (offloading moves layers)."""
        assert self.grid is not None
        return TokenLayout.of(self.grid, self.tile, device=device)

    def sequence(self, tokens: int) -> Sequence | str:
        """A layer's sequence of so many valid tokens, or one sentence on why it cannot be this video."""
        assert self.grid is not None
        others = tokens - self.grid.tokens
        before = others if self.before is None else self.before
        if not 0 <= before <= others or (others and not self.joint):
            return (
                f"the layer sees {tokens} tokens where the grid {self.grid} has {self.grid.tokens}"
                + (f" after {before} others" if before > 0 else "")
                + " (a sharded or extended sequence)"
            )
        return Sequence(self.grid, self.tile, tokens, before, self.tiled)

    def parts(self, q: torch.Tensor, mask: torch.Tensor | None) -> tuple[Part, ...] | str:
        """The batch by number of valid tokens, or one sentence on why the mask is more than padding.

        Layers of one pass share their mask, so it is read back from the device once.
        """
        batch, tokens = q.shape[:2]
        if mask is None:
            return (Part(None, 1.0, tokens),)
        if mask.numel() > batch * tokens:  # no device read, and nothing to keep
            return padding_of(mask, batch, tokens)  # type: ignore[return-value]
        key = (mask.data_ptr(), mask.shape, mask.stride(), batch, tokens)
        if key not in self.padding:
            found = padding_of(mask, batch, tokens)
            # the mask is kept, or another could take its place in memory
            self.padding[key] = mask, found if isinstance(found, str) else parts_of(found, q.device)
        return self.padding[key][1]


class Session:
    """A patched pipeline: change nothing here while it runs.

    Args:
        plan: what to run where.
        clock: tells the noise level; shared by both transformers.
        strict: raise :class:`StrictError` where a layer would run other than planned, instead of reporting it.
        allow_mismatch: warn instead of raising when the plan's fingerprint names another model or grid.
        kernel: name of the kernel to use, or ``None`` for the best one that can run.
        guard: which sparse calls are compared with exact attention.
    """

    def __init__(
        self,
        plan: Plan,
        clock: Clock,
        *,
        strict: bool = False,
        allow_mismatch: bool = False,
        kernel: str | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.plan = plan
        self.clock = clock
        self.strict = strict
        self.allow_mismatch = allow_mismatch
        self.kernel = kernel
        self.guard = Guard() if guard is None else guard
        #: Sees what runs dense, if set before the run; a plan that is dense everywhere is what it is meant for.
        self.observer: Observer | None = None
        #: Tile shape in which it wants to see it, for such a plan.
        self.observed_tile: TileShape | None = None
        self.sites: list[AttentionSite] = []
        self.not_patched: list[dict[str, str]] = []
        #: What became of Linears that the plan wants in 8 bits, see :class:`Report`.
        self.linear: list[dict[str, Any]] = []
        self.kernels: dict[KernelRequest, tuple[Kernel | None, Precision, str | None]] = {}
        self._policies: dict[tuple[int, str, int, str | None], LayerPolicy] = {}
        self._groups: dict[tuple[LayerPolicy, int, TokenLayout, HeadShare | None], tuple[HeadGroup, ...]] = {}
        self._grids: set[VideoGrid] = set()
        self._said: dict[str, None] = {}
        self._undo: list[Callable[[], Any]] = []

    def __repr__(self) -> str:
        state = f"{len(self.sites)} layers" if self._undo else "closed"
        return f"Session(plan={self.plan.name!r}, {state})"

    # -- for users ----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What ran since patching or :meth:`reset_stats`: density, seconds and fallbacks per layer."""
        return Report.of(self.plan.name, [s.stats for s in self.sites], self.not_patched, list(self._said), self.linear)

    def reset_stats(self) -> None:
        """Starts all counters anew."""
        for site in self.sites:
            old = site.stats
            site.stats = LayerStats(old.transformer, old.layer, old.module)

    def close(self) -> None:
        """Undoes every change to the pipeline, in reverse order; the statistics stay readable. Twice is once."""
        while self._undo:
            self._undo.pop()()

    @property
    def closed(self) -> bool:
        """Whether nothing of the pipeline is patched any more."""
        return not self._undo

    # -- for patchers -------------------------------------------------------------------------------------------

    def on_close(self, undo: Callable[[], Any]) -> None:
        """Registers one step back."""
        self._undo.append(undo)

    def add_site(self, state: TransformerState, layer: int, module: str, dense: DenseAttention) -> AttentionSite:
        """Registers one patched attention layer."""
        site = AttentionSite(self, state, layer, dense, LayerStats(state.name, layer, module))
        self.sites.append(site)
        return site

    def enter(
        self,
        state: TransformerState,
        moment: Moment,
        grid: VideoGrid | str,
        *,
        tiled: bool,
        before: int | None = 0,
        ranks: Ranks | None = None,
    ) -> None:
        """Starts a forward pass.

        Args:
            grid: the token grid, or one sentence on why it is unknown.
            tiled: whether the patcher reorders the tokens once for this pass.
            before: how many tokens that are not video precede it in the layers' sequence; ``None`` for all of them.
            ranks: the processes that share that sequence, if they do; then nothing may be tiled.

        Raises:
            PlanMismatchError: if the plan was made for another grid and ``allow_mismatch`` is off.
        """
        state.moment, state.ranks = moment, ranks
        state.padding.clear()  # another pass may have another mask at the same place
        if isinstance(grid, str) or (self.plan.is_dense and self.observer is None):
            state.grid, state.tiled = None, False
            state.dense_reason = grid if isinstance(grid, str) else None
            return
        if grid not in self._grids:
            self._check_grid(grid)
            self._grids.add(grid)
        state.grid, state.before, state.tile, state.tiled = grid, before, self.plan.tile, tiled
        if self.plan.is_dense:  # nothing is reordered; the observer gets its own copies
            state.tile, state.tiled = self.observed_tile, False
        elif not tiled:
            self.say_once(f"{state.name}: tokens are reordered in every layer, not once per forward pass")
        if ranks is not None and not self.plan.is_dense:
            self.say_once(
                f"{state.name}: {ranks.count} ranks exchange their tokens for heads in sparse calls"
                + ("" if ranks.ulysses == ranks.count else ", and rotate keys, as ring_degree asks, in dense ones only")
                + "; this report is of the heads of one rank"
            )

    def _check_grid(self, grid: VideoGrid) -> None:
        made_for = self.plan.fingerprint.grid if self.plan.fingerprint else None
        if made_for is None or made_for == grid:
            return
        message = (
            f"the plan {self.plan.name!r} was made for a {made_for} token grid and this video has {grid};"
            " use the resolution it was made for, or patch with allow_mismatch=True"
        )
        if not self.allow_mismatch:
            raise PlanMismatchError(message)
        warnings.warn(message, VidaccelWarning, stacklevel=2)
        self.say_once(message)

    # -- for the hot path ---------------------------------------------------------------------------------------

    def policy(self, moment: Moment, transformer: str, layer: int) -> LayerPolicy:
        """The plan's choice, remembered per noise bin."""
        key = (self.plan.noise_bin(moment.noise_level), transformer, layer, moment.branch)
        if key not in self._policies:
            self._policies[key] = self.plan.lookup(moment.noise_level, transformer, layer, moment.branch)
        return self._policies[key]

    def groups(
        self, policy: LayerPolicy, num_heads: int, layout: TokenLayout, share: HeadShare | None = None
    ) -> tuple[HeadGroup, ...]:
        """The policy made ready for kernels on this layout, remembered; see :func:`~.prepare.prepare`."""
        key = (policy, num_heads, layout, share)
        if key not in self._groups:
            if len(self._groups) >= _MAX_GROUPS:  # every length of text has a layout of its own
                self._groups.pop(next(iter(self._groups)))
            self._groups[key] = prepare(policy, num_heads, layout, share)
            mine = policy.heads if share is None else [policy.for_head(head, num_heads) for head in share.numbers]
            if not self._groups[key] and not all(head.is_dense for head in mine):
                patterns = ", ".join(dict.fromkeys(str(head.pattern) for head in mine))
                self.say_once(f"{patterns} keeps every block of a {layout.grid} grid, so it runs as plain attention")
        return self._groups[key]

    def say_once(self, event: str) -> None:
        """Adds a note to the report, unless it is there already."""
        self._said.setdefault(event)
