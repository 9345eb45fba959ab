"""One attention call, from policy to output: the only place that decides between sparse and dense.

    policy of this moment -> head groups -> kernel -> guard -> out

Every way out of the sparse path leaves its reason in the statistics.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ..errors import KernelError, VidaccelWarning
from ..kernels.contract import Kernel, KernelRequest
from ..kernels.dispatch import select
from ..patterns.dynamic import Heads
from ..types import PRECISIONS, Precision
from .guard import bounded, check_heads, is_bounded, what_is_wrong
from .prepare import HeadGroup
from .run import run_heads
from .sequence import Part, Sequence
from .site import AttentionSite, Observer

if TYPE_CHECKING:
    from .session import Session

__all__ = ["attend", "passed_by"]


@dataclass(frozen=True, eq=False)
class Work:
    """What to run for some samples of a batch: their sequence, and which kernel on which heads with which mask."""

    part: Part
    sequence: Sequence
    groups: list[tuple[Kernel, HeadGroup]]


def attend(
    site: AttentionSite,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention of one patched layer.

    Args:
        q, k, v: [B, S, H, D] after norms and RoPE; the video's tokens in raster order, or in layout order if
            ``site.state.tiled``.
        mask: attention mask the model passed, in raster order, or ``None``; see :func:`~.sequence.padding_of`.
        hidden: what the layer's projections took, if the plan asks for it: [B, S, C], or of the video's tokens alone.

    Returns:
        [B, S, H, D], in the order the tokens came in. Padding has zeros where the call ran sparse.

    Raises:
        StrictError: in a strict session, if the plan wanted something else than what can run.
    """
    with site.stats.watch.running(q.device):
        work, reason = _decide(site, q, mask, hidden)
        if reason is not None:
            site.fell_back(reason)
        if work:
            return _guarded(site, work, q, k, v, mask, hidden)
        out = site.run_dense(q, k, v, mask)
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
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """The sparse output, or the dense one where the guard objects."""
    site.watch.start(site.session.guard)
    out, density = _sparse(site, work, q, k, v, hidden)
    wrong = what_is_wrong(out, v, site.first_head)
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
        q_, k_, v_, out_ = (sequence.to_layout(part.take(x)) for x in (q, k, v, out))
        observer.observe(site, site.heads(sequence, q_, k_, v_), out_)


def passed_by(site: AttentionSite, reason: str) -> None:
    """Counts a call that never reached :func:`attend`, because it is no attention that a kernel here could run.

    Raises:
        StrictError: in a strict session, if the plan wanted this call sparse.
    """
    state, session = site.state, site.session
    if state.moment is None or not session.policy(state.moment, state.name, site.layer).is_dense:
        site.fell_back(state.dense_reason or reason)
    site.stats.count("dense", 1.0, sparse=False)


def _decide(
    site: AttentionSite, q: torch.Tensor, mask: torch.Tensor | None, hidden: torch.Tensor | None
) -> tuple[list[Work], str | None]:
    """What to run sparse (nothing: dense), and a reason if that is not what the plan says."""
    state, session = site.state, site.session
    if state.moment is None:
        return [], f"{state.name} was not entered through its forward pass, so the noise level is unknown"
    planned = session.policy(state.moment, state.name, site.layer)
    if planned.is_dense:
        return [], None
    heads = q.shape[2] if site.share is None else site.share.total
    excluded, policy = site.watch.reason(session.guard), site.watch.policy(planned, heads)
    if policy.is_dense:
        return [], excluded
    if state.grid is None:
        return [], state.dense_reason or "the token grid is unknown"
    if hidden is not None and hidden.shape[1] not in (q.shape[1], state.grid.tokens):
        return [], f"its trained gate is for {hidden.shape[1]} tokens, and the layer attends {q.shape[1]}"
    parts = state.parts(q, mask)
    if isinstance(parts, str):
        return [], parts
    work: list[Work] = []
    reasons: dict[str, None] = {} if excluded is None else {excluded: None}
    for part in parts:
        sequence = state.sequence(part.valid)
        if isinstance(sequence, str):
            return [], sequence
        one = Work(part, sequence, [])
        for group in session.groups(policy, heads, sequence.layout(q.device), site.share):
            kernel, group, reason = _kernel(session, group, q)
            if reason is not None:
                reasons[reason] = None
            if kernel is None:
                return [], reason
            one.groups.append((kernel, group))
        if not one.groups:  # this policy keeps everything
            return [], excluded
        work.append(one)
    return work, "; ".join(reasons) or None


def _kernel(session: Session, group: HeadGroup, q: torch.Tensor) -> tuple[Kernel | None, HeadGroup, str | None]:
    """The kernel for a group; in the model's own dtype where this device lacks the precision, with the reason."""
    request = group.request(q)
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


def _sparse(
    site: AttentionSite,
    work: list[Work],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, float]:
    """Runs every part of the batch; returns the output in the order the tokens came in, and the density."""
    (first, *others) = work
    if not others and first.part.valid == q.shape[1]:
        return _run(site, first, q, k, v, hidden)
    out, density = q.new_zeros(q.shape), 0.0
    for one in work:
        inputs = (None if x is None else one.part.take(x) for x in (q, k, v, hidden))
        result, kept = _run(site, one, *inputs)  # type: ignore[arg-type]
        density += one.part.share * kept
        if one.part.samples is None:
            out[:, : one.part.valid] = result
        else:
            out[one.part.samples, : one.part.valid] = result
    return out, density


def _run(
    site: AttentionSite,
    work: Work,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, float]:
    """Runs every group on samples of one length; returns the output and its density."""
    q, k, v = (work.sequence.to_layout(x) for x in (q, k, v))
    if hidden is not None:
        sequence = work.sequence
        if hidden.shape[1] < sequence.tokens:  # other tokens join the video inside the layer; no gate is theirs
            hidden = F.pad(hidden, (0, 0, sequence.before, sequence.others - sequence.before))
        hidden = sequence.to_layout(hidden.to(q.device))  # an offloaded layer may take it on another device
    heads = site.heads(work.sequence, q, k, v, hidden)
    out: torch.Tensor | None = None
    density = 0.0
    for kernel, group in work.groups:
        # other blocks, other heads and samples of other lengths have memories of their own
        memory = site.memory((group.pattern or group.mask, group.compensation, group.members, work.part.valid))
        result, kept = run_heads(kernel, group, group.of(heads), memory)
        density += group.share * kept
        if group.heads is None:  # the only group, so its output is the layer's
            out = result
        else:
            out = torch.empty_like(q) if out is None else out
            out.index_copy_(2, group.heads, result)
    assert out is not None  # there is at least one group
    if site.watch.due:
        _check(site, heads, out)
    return work.sequence.from_layout(out), density


def _check(site: AttentionSite, heads: Heads, out: torch.Tensor) -> None:
    """Compares an output in layout order with exact attention; heads that are off run dense from here on."""
    guard, state = site.session.guard, site.state
    found = check_heads(guard, site.watch, heads, out)
    found = {head: error for head, error in found.items() if head not in site.watch.errors}
    if not found:
        return
    site.watch.exclude(found)
    site.memories.clear()  # heads are grouped anew
    assert state.moment is not None
    for head, error in found.items():
        site.session.say_once(
            f"guard: head {head} of {state.name} layer {site.layer} runs dense from step {state.moment.step} on: its"
            f" sampled relative error is {error:.3g}, above the limit {guard.limit:g}"
        )
    reason = site.watch.reason(guard)
    assert reason is not None
    site.fell_back(reason)


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
    site.fell_back(f"guard: {wrong}")
    site.session.say_once(f"guard: {wrong} at {where}; that call ran dense")
    site.memories.clear()  # what the call left behind may be as bad
    out = site.run_dense(q, k, v, mask)
    still = what_is_wrong(out, v, site.first_head)
    if still is not None:
        # the input was bad already: attention cannot mend it, but nobody should blame the sparse kernel
        message = f"{where}: dense attention gives {still} too, so the input of this layer is at fault"
        if not is_bounded(out):
            message += "; its values that are not finite count as 0, and huge ones are cut"
            out = site.run_dense(bounded(q), bounded(k), bounded(v), mask)
        site.session.say_once(message)
        warnings.warn(message, VidaccelWarning, stacklevel=2)
    site.stats.count("dense", 1.0, sparse=False)
    return out
