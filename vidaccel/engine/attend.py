"""One attention call, from policy to output: the only place that decides between sparse and dense.

    policy of this moment -> head groups -> kernel -> guard -> out

Every way out of the sparse path leaves its reason in the statistics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from ..blockmask import BlockMask
from ..errors import KernelError, StrictError, VidaccelWarning
from ..kernels.contract import Kernel, KernelRequest
from ..kernels.dispatch import select
from ..layout import TokenLayout
from ..patterns.dynamic import DynamicPattern, Heads, choose_blocks
from ..types import PRECISIONS, Precision
from .guard import what_is_wrong
from .prepare import HeadGroup
from .sequence import Part, Sequence
from .stats import LayerStats

if TYPE_CHECKING:
    from .session import Session, TransformerState

__all__ = ["AttentionSite", "Observer", "attend"]

#: ``dense(q, k, v, mask) -> out``, all [B, S, H, D]: what the unpatched layer would have run.
DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Work:
    """What to run for some samples of a batch: their sequence, and which kernel on which heads with which mask."""

    part: Part
    sequence: Sequence
    groups: list[tuple[Kernel, HeadGroup]]


class Observer(Protocol):
    """Looks on while layers run dense; calibration is one."""

    def wants(self, site: AttentionSite) -> bool:
        """Whether to show this call, which has just run dense, to :meth:`observe`."""

    def observe(
        self,
        site: AttentionSite,
        layout: TokenLayout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Sees q, k, v and the dense output of some samples, [B,S,H,D] in layout order, without padding."""


@dataclass(eq=False)
class AttentionSite:
    """One patched attention layer: where it is, what it ran before, and its statistics."""

    session: Session
    state: TransformerState
    layer: int
    dense: DenseAttention
    stats: LayerStats
    memories: dict[Any, tuple[int, dict[str, Any]]] = field(default_factory=dict)

    def memory(self, of: Any) -> dict[str, Any]:
        """What the pattern of these heads and this guidance branch remembers of the run; empty in a new run."""
        moment = self.state.moment
        assert moment is not None
        key = (of, moment.branch)
        run, found = self.memories.get(key, (-1, {}))
        if run != moment.run:
            found = {}
            self.memories[key] = moment.run, found
        return found


def attend(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Self-attention of one patched layer.

    Args:
        q, k, v: [B, S, H, D] after norms and RoPE; the video's tokens in raster order, or in layout order if
            ``site.state.tiled``.
        mask: attention mask the model passed, in raster order, or ``None``; see :func:`~.sequence.padding_of`.

    Returns:
        [B, S, H, D], in the order the tokens came in. Padding has zeros where the call ran sparse.

    Raises:
        StrictError: in a strict session, if the plan wanted something else than what can run.
    """
    with site.stats.watch.running(q.device):
        work, reason = _decide(site, q, mask)
        if reason is not None:
            _fell_back(site, reason)
        if work:
            return _guarded(site, work, q, k, v, mask)
        out = _dense(site, q, k, v, mask)
        site.stats.count("dense", 1.0, sparse=False)
    observer = site.session.observer
    if observer is not None and reason is None and observer.wants(site):
        _show(observer, site, q, k, v, mask, out)
    return out


def _guarded(
    site: AttentionSite,
    work: list[Work],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """The sparse output, or the dense one where the guard objects."""
    out, density = _sparse(site, work, q, k, v)
    wrong = what_is_wrong(out, v)
    if wrong is not None:
        return _after_guard(site, q, k, v, mask, wrong)
    names = "+".join(dict.fromkeys(kernel.name for one in work for kernel, _ in one.groups))
    site.stats.count(names, density, sparse=True)
    return out


def _show(
    observer: Observer,
    site: AttentionSite,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Shows a dense call to the observer; what a sparse kernel could not have run is counted with its reason."""
    state = site.state
    if state.grid is None:
        site.stats.fallbacks[f"not observed: {state.dense_reason or 'the token grid is unknown'}"] += 1
        return
    parts = state.parts(q, mask)
    for part in (parts,) if isinstance(parts, str) else parts:
        sequence = part if isinstance(part, str) else state.sequence(part.valid)
        if isinstance(sequence, str):
            site.stats.fallbacks[f"not observed: {sequence}"] += 1
            return
        assert isinstance(part, Part)
        layout = sequence.layout(q.device)
        observer.observe(site, layout, *(sequence.to_layout(part.take(x)) for x in (q, k, v, out)))


def passed_by(site: AttentionSite, reason: str) -> None:
    """Counts a call that never reached :func:`attend`, because it is no attention that a kernel here could run.

    Raises:
        StrictError: in a strict session, if the plan wanted this call sparse.
    """
    state, session = site.state, site.session
    if state.moment is None or not session.policy(state.moment, state.name, site.layer).is_dense:
        _fell_back(site, state.dense_reason or reason)
    site.stats.count("dense", 1.0, sparse=False)


def _decide(site: AttentionSite, q: torch.Tensor, mask: torch.Tensor | None) -> tuple[list[Work], str | None]:
    """What to run sparse (nothing: dense), and a reason if that is not what the plan says."""
    state, session = site.state, site.session
    if state.moment is None:
        return [], f"{state.name} was not entered through its forward pass, so the noise level is unknown"
    policy = session.policy(state.moment, state.name, site.layer)
    if policy.is_dense:
        return [], None
    if state.grid is None:
        return [], state.dense_reason or "the token grid is unknown"
    parts = state.parts(q, mask)
    if isinstance(parts, str):
        return [], parts
    work: list[Work] = []
    reasons: dict[str, None] = {}
    for part in parts:
        sequence = state.sequence(part.valid)
        if isinstance(sequence, str):
            return [], sequence
        one = Work(part, sequence, [])
        for group in session.groups(policy, q.shape[2], sequence.layout(q.device)):
            kernel, group, reason = _kernel(session, group, q)
            if reason is not None:
                reasons[reason] = None
            if kernel is None:
                return [], reason
            one.groups.append((kernel, group))
        if not one.groups:  # this policy keeps everything
            return [], None
        work.append(one)
    return work, "; ".join(reasons) or None


def _kernel(session: Session, group: HeadGroup, q: torch.Tensor) -> tuple[Kernel | None, HeadGroup, str | None]:
    """The kernel for a group; in the model's own dtype where this device lacks the precision, with the reason."""
    request = KernelRequest.of(q, group.precision, tail=group.tail)
    if request not in session.kernels:
        session.kernels[request] = _choose(request, session.kernel)
    kernel, precision, reason = session.kernels[request]
    return kernel, group if precision == group.precision else replace(group, precision=precision), reason


def _choose(request: KernelRequest, prefer: str | None) -> tuple[Kernel | None, Precision, str | None]:
    try:
        return select(request, prefer=prefer), request.precision, None
    except KernelError as error:
        native = PRECISIONS["native"]
        if not request.precision.quantised:
            return None, native, str(error)
        kernel, _, worse = _choose(replace(request, precision=native), prefer)
        lacking = f"precision {request.precision.name} ran in the model's own dtype: {error}"
        return kernel, native, worse or lacking


def _dense(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the unpatched layer runs. Token order does not matter to it, unless the model's mask has one."""
    state = site.state
    if mask is not None and mask.dim() == 2:  # of the last tokens only; attention functions take one over all
        mask = F.pad(mask.bool(), (q.shape[1] - mask.shape[1], 0), value=True)[:, None, None]
    if mask is None or not state.tiled or not isinstance(state.parts(q, mask), str):
        return site.dense(q, k, v, mask)
    sequence = state.sequence(q.shape[1])
    assert isinstance(sequence, Sequence)  # tiled only if the sequence is known
    layout = sequence.layout(q.device)
    return layout.tile(site.dense(layout.untile(q), layout.untile(k), layout.untile(v), mask))


def _sparse(
    site: AttentionSite, work: list[Work], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Runs every part of the batch; returns the output in the order the tokens came in, and the density."""
    (first, *others) = work
    if not others and first.part.valid == q.shape[1]:
        return _run(site, first, q, k, v)
    out, density = q.new_zeros(q.shape), 0.0
    for one in work:
        result, kept = _run(site, one, *(one.part.take(x) for x in (q, k, v)))
        density += one.part.share * kept
        if one.part.samples is None:
            out[:, : one.part.valid] = result
        else:
            out[one.part.samples, : one.part.valid] = result
    return out, density


def _run(
    site: AttentionSite, work: Work, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Runs every group's kernel on samples of one length; returns the output and its density."""
    layout = work.sequence.layout(q.device)
    q, k, v = (work.sequence.to_layout(x) for x in (q, k, v))
    out: torch.Tensor | None = None
    density = 0.0
    for kernel, group in work.groups:
        heads = group.heads
        qh, kh, vh = (q, k, v) if heads is None else (x.index_select(2, heads) for x in (q, k, v))
        mask, kept, tail = group.mask, group.density, group.tail
        if mask is None or kept is None:
            assert group.pattern is not None
            # other heads and samples of other lengths have memories of their own
            memory = site.memory((group.pattern, group.members, work.part.valid))
            mask = _chosen(site, group.pattern, memory, layout, qh, kh, vh)
            kept = mask.density(layout)
            tail = tail and not mask.is_full()
        density += group.share * kept
        result = kernel(qh, kh, vh, layout, mask, precision=group.precision, tail=tail)
        assert isinstance(result, torch.Tensor)  # no LSE was asked for
        if heads is None:  # the only group, so its output is the layer's
            out = result
        else:
            out = torch.empty_like(q) if out is None else out
            out.index_copy_(2, heads, result)
    assert out is not None  # there is at least one group
    return work.sequence.from_layout(out), density


def _chosen(
    site: AttentionSite,
    pattern: DynamicPattern,
    memory: dict[str, Any],
    layout: TokenLayout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> BlockMask:
    """The blocks that a dynamic pattern keeps in this call."""
    moment = site.state.moment
    assert moment is not None  # or the call would run dense
    heads = Heads(q, k, v, layout, memory, noise_level=moment.noise_level, step=moment.step)
    return BlockMask.from_dense(choose_blocks(pattern, heads))


def _after_guard(
    site: AttentionSite,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    wrong: str,
) -> torch.Tensor:
    """The same call again, dense, and the story told."""
    state = site.state
    assert state.moment is not None
    where = f"{state.name} layer {site.layer}, step {state.moment.step}"
    _fell_back(site, f"guard: {wrong}")
    site.session.say_once(f"guard: {wrong} at {where}; that call ran dense")
    out = _dense(site, q, k, v, mask)
    still = what_is_wrong(out, v)
    if still is not None:
        # the input was bad already: attention cannot mend it, but nobody should blame the sparse kernel
        message = f"{where}: dense attention gives {still} too, so the input of this layer is at fault"
        site.session.say_once(message)
        warnings.warn(message, VidaccelWarning, stacklevel=2)
    site.stats.count("dense", 1.0, sparse=False)
    return out


def _fell_back(site: AttentionSite, reason: str) -> None:
    """Counts a call that does not run as planned, or raises in a strict session."""
    if site.session.strict:
        raise StrictError(
            f"{site.state.name} layer {site.layer} cannot run as the plan says: {reason};"
            " patch with strict=False to let it run otherwise and have that reported"
        )
    site.stats.fallbacks[reason] += 1
