"""What ``vidaccel.patch`` returns: it owns the runs, the statistics and the undo list.

Two pipelines with different plans do not meet here. What belongs to one forward pass lies in its
:class:`~.context.ForwardContext`, and what is remembered from pass to pass in the :class:`~.runs.DenoisingRun`.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..configs.plan import LayerPolicy, Plan
from ..errors import PlanMismatchError, VidaccelWarning
from ..layout import TokenLayout
from ..types import TileShape, VideoGrid
from .attachment import Attachment, NotPickled, attachment_of
from .choice import KernelChoices
from .context import ForwardContext, PatchedTransformer
from .guard import Guard
from .pipeline_call import PipelineCall, check_idle, pipeline_call
from .prepare import HeadGroup, HeadShare, is_stateful, prepare
from .proof import Proofs
from .runs import DenoisingRun, Moment, RunBook
from .site import AttentionSite, DenseAttention, Observer
from .stats import LayerStats, Report

if TYPE_CHECKING:
    from .parallel import Ranks

__all__ = ["Session"]

_MAX_GROUPS = 256


class Session(NotPickled):
    """A patched pipeline.

    Args:
        plan: what to run where.
        pipe: the pipeline that is patched, or a bare transformer, or ``None`` without one. It is not kept alive.
        strict: raise :class:`StrictError` where a layer would run other than planned, instead of reporting it.
        allow_mismatch: warn instead of raising when the plan's fingerprint names another model or grid.
        kernel: name of the kernel to use, or ``None`` for the best one that can run.
        guard: which sparse calls are compared with exact attention.
    """

    def __init__(
        self,
        plan: Plan,
        pipe: Any = None,
        *,
        strict: bool = False,
        allow_mismatch: bool = False,
        kernel: str | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.plan = plan
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
        self.kernels = KernelChoices(kernel)
        self.proofs = Proofs(self.kernels)
        self.runs = RunBook()
        self._pipe: Callable[[], Any] = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._names: list[str] = []
        self._attachments: list[weakref.ref[Attachment]] = []
        self._policies: dict[tuple[int, str, int, str | None], LayerPolicy] = {}
        self._groups: dict[tuple[LayerPolicy, int, TokenLayout, HeadShare | None], tuple[HeadGroup, ...]] = {}
        self._grids: set[VideoGrid] = set()
        self._said: dict[str, None] = {}
        self._undo: list[Callable[[], Any]] = []
        self._closed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.sites)} layers"
        return f"Session(plan={self.plan.name!r}, {state})"

    # -- for users ----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What ran since patching or :meth:`reset_stats`: density, seconds and fallbacks per layer."""
        return Report.of(
            self.plan.name, [site.stats for site in self.sites], [*self.not_patched, *self._replaced()],
            list(self._said), self.linear,
        )  # fmt: skip

    def reset_stats(self) -> None:
        """Starts all counters anew."""
        for site in self.sites:
            old = site.stats
            site.stats = LayerStats(old.transformer, old.layer, old.module)

    def new_run(self) -> DenoisingRun:
        """Begins a new denoising run: what patterns and compensations remember is that of this run from here on.

        A pipeline's call begins one by itself. A loop of one's own says so, because equal noise levels may be one run
        or two. Loops that take turns, such as windows over a long video, keep their runs and say which one goes on::

            windows = [(session.new_run(), window) for window in cut(latents)]
            for t in timesteps:
                for run, window in windows:
                    with run:
                        window.step(transformer(window.latents, t, text), t)

        Outside of such blocks the passes of this thread belong to the run that was begun last.
        """
        return self.runs.begin(self.pipeline_call())

    def close(self) -> None:
        """Undoes every change to the pipeline, in reverse order; the statistics stay readable. Twice is once.

        Raises:
            PatchError: if the pipeline is running.
        """
        if self._closed:
            return
        attachments = self.attachments()
        check_idle(self._pipe(), [attachment.model for attachment in attachments], "unpatch")
        self._closed = True
        for attachment in reversed(attachments):
            attachment.undo()
        while self._undo:
            self._undo.pop()()

    @property
    def closed(self) -> bool:
        """Whether nothing of the pipeline is patched any more."""
        return self._closed

    def copied(self, memo: dict[int, Any]) -> Session:
        """The session of a copy: the same plan and settings, nothing patched yet, nothing counted.

        Args:
            memo: of ``copy.deepcopy``; copies in one go share a session.
        """
        if id(self) not in memo:
            memo[id(self)] = Session(
                self.plan, memo.get(id(self._pipe())), strict=self.strict, allow_mismatch=self.allow_mismatch,
                kernel=self.kernel, guard=self.guard,
            )  # fmt: skip
        return memo[id(self)]  # type: ignore[no-any-return]

    __deepcopy__ = copied

    # -- for patchers -------------------------------------------------------------------------------------------

    @property
    def pipe(self) -> Any:
        """The pipeline that was patched, or ``None`` if it is gone."""
        return self._pipe()

    def on_close(self, undo: Callable[[], Any]) -> None:
        """Registers one step back that is not of one transformer."""
        self._undo.append(undo)

    def attach(self, model: nn.Module, name: str) -> Attachment:
        """Registers a transformer; what is changed on it goes to the attachment, which lives as long as the model."""
        attachment = Attachment(self, model, name)
        self._names.append(name)
        self._attachments.append(weakref.ref(attachment))
        return attachment

    def attachments(self) -> list[Attachment]:
        """Those of the transformers that still exist."""
        return [attachment for ref in self._attachments if (attachment := ref()) is not None]

    def add_site(
        self, transformer: PatchedTransformer, layer: int, module: str, dense: DenseAttention
    ) -> AttentionSite:
        """Registers one patched attention layer."""
        site = AttentionSite(self, transformer, layer, dense, LayerStats(transformer.name, layer, module))
        self.sites.append(site)
        return site

    def pipeline_call(self) -> PipelineCall | None:
        """The call of a pipeline, in this thread, that holds a transformer of this session."""
        calls = (pipeline_call(attachment.model) for attachment in self.attachments())
        return next((call for call in calls if call is not None), None)

    def enter(
        self,
        transformer: PatchedTransformer,
        moment: Moment,
        run: DenoisingRun,
        grid: VideoGrid | str,
        *,
        tiled: bool,
        before: int | None = 0,
        ranks: Ranks | None = None,
    ) -> ForwardContext:
        """Starts a forward pass in this thread.

        Args:
            run: what it belongs to.
            grid: the token grid, or one sentence on why it is unknown.
            tiled: whether the patcher reorders the tokens once for this pass.
            before: how many tokens that are not video precede it in the layers' sequence; ``None`` for all of them.
            ranks: the processes that share that sequence, if they do; then nothing may be tiled.

        Raises:
            PlanMismatchError: if the plan was made for another grid and ``allow_mismatch`` is off.
        """
        context = ForwardContext(moment, run, joint=transformer.joint, before=before, ranks=ranks)
        transformer.context = context
        if run.crowded and self._is_stateful():
            self.say_once(
                "a loop takes more than two passes of one name at one noise level, so nothing is remembered from step"
                " to step; begin a run for each: run = session.new_run(), then `with run:` around its passes"
            )
        name = transformer.name
        if isinstance(grid, str) or (self.plan.is_dense and self.observer is None):
            context.dense_reason = grid if isinstance(grid, str) else None
            return context
        if grid not in self._grids:
            self._check_grid(grid)
            self._grids.add(grid)
        context.grid, context.tile, context.tiled = grid, self.plan.tile, tiled
        if self.plan.is_dense:  # nothing is reordered; the observer gets its own copies
            context.tile, context.tiled = self.observed_tile, False
        elif not tiled:
            self.say_once(f"{name}: tokens are reordered in every layer, not once per forward pass")
        if ranks is not None and not self.plan.is_dense:
            self.say_once(
                f"{name}: {ranks.count} ranks exchange their tokens for heads in sparse calls"
                + ("" if ranks.ulysses == ranks.count else ", and rotate keys, as ring_degree asks, in dense ones only")
                + "; this report is of the heads of one rank"
            )
        return context

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

    def _is_stateful(self) -> bool:
        heads = {head for rule in self.plan.rules for head in rule.policy.heads}
        return any(is_stateful(head) for head in heads)

    def _replaced(self) -> list[dict[str, str]]:
        """What was put in place of what is patched, for the report."""
        if self._closed:
            return []
        found = [
            {"module": module, "reason": reason}
            for attachment in self.attachments()
            for module, reason in attachment.replaced()
        ]
        return found + [{"module": name, "reason": reason} for name, reason in self.swapped().items()]

    def swapped(self) -> dict[str, str]:
        """Components of the pipeline that other models took the place of, and why they do not run by the plan."""
        pipe, found = self._pipe(), {}
        if pipe is None or isinstance(pipe, nn.Module):
            return {}
        for name in self._names:
            now = getattr(pipe, name, None)
            modules = now.modules() if isinstance(now, nn.Module) else ()
            if now is not None and all(attachment_of(module) is None for module in modules):
                found[name] = (
                    f"it was replaced after patching by a {type(now).__name__}, which neither is patched nor holds what"
                    " is, so it runs dense; call vidaccel.unpatch(pipe) and patch again"
                )
        return found

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
        found = self._groups.get(key)
        if found is not None:
            return found
        found = prepare(policy, num_heads, layout, share)
        mine = policy.heads if share is None else [policy.for_head(head, num_heads) for head in share.numbers]
        if not found and not all(head.is_dense for head in mine):
            patterns = ", ".join(dict.fromkeys(str(head.pattern) for head in mine))
            self.say_once(f"{patterns} keeps every block of a {layout.grid} grid, so it runs as plain attention")
        with self._lock:
            if len(self._groups) >= _MAX_GROUPS:  # every length of text has a layout of its own
                self._groups.pop(next(iter(self._groups)))
            return self._groups.setdefault(key, found)

    def say_once(self, event: str) -> None:
        """Adds a note to the report, unless it is there already."""
        self._said.setdefault(event)
