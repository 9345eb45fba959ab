"""One attention call, from policy to output: the only place that decides between sparse and dense.

    policy of this moment -> head groups -> kernel -> guard -> out

Every way out of the sparse path leaves its reason in the statistics.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..configs.plan import BRANCHES
from ..errors import VidaccelWarning
from ..kernels.failures import in_words, is_passing, told_to
from ..patterns.dynamic import Heads
from .choice import ChosenKernel, NoKernelError
from .guard import bounded, check_heads, is_bounded, what_is_wrong
from .prepare import HeadGroup, HeadShare
from .run import run_heads
from .sequence import Part, Sequence
from .site import AttentionSite, LayerCall, Observer, over_all_tokens

__all__ = ["attend", "passed_by"]

_NO_PASS = (
    "{} was not entered through its forward pass, so the noise level is unknown; call the model, not its blocks or its"
    " `forward`, which go past the hooks"
)


_UNNAMED = (
    "the plan has rules by pass of guidance, and nothing tells which pass of guidance this is; open"
    ' `with transformer.cache_context("cond")` around it, or "uncond"'
)


@dataclass(frozen=True, eq=False)
class Work:
    """What to run for some samples of a batch: their sequence, and which kernel on which heads with which mask."""

    part: Part
    sequence: Sequence
    groups: list[tuple[ChosenKernel, HeadGroup]]


def attend(
    site: AttentionSite,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    share: HeadShare | None = None,
) -> torch.Tensor:
    """Self-attention of one patched layer, in the forward pass that runs in this thread.

    Args:
        q, k, v: [B, S, H, D] after norms and RoPE; the video's tokens in raster order, or in layout order if the pass
            is ``tiled``.
        mask: attention mask the model passed, in raster order, or ``None``; see :func:`~.sequence.padding_of`.
        hidden: what the layer's projections took, if the plan asks for it: [B, S, C], or of the video's tokens alone.
        share: the heads that q, k and v have, if they are not all of the layer's.

    Returns:
        [B, S, H, D], in the order the tokens came in. Padding has zeros where the call ran sparse.

    Raises:
        StrictError: in a strict session, if the plan wanted something else than what can run.
    """
    context = site.transformer.context
    if context is None:
        return _outside(site, q, k, v, mask)
    call = LayerCall(site, context, share)
    if context.grid is not None and not site.session.plan.is_dense:
        tile = context.layout(q.device).tile_shape
        site.session.proofs.prove(site.session.plan, q.device, q.dtype, q.shape[-1], tile)
    with site.stats.timer.running(q.device):
        work, reason = _decide(call, q, mask, hidden)
        if reason is not None:
            site.fell_back(reason)
        if work:
            return _guarded(call, work, q, k, v, mask, hidden)
        out = call.run_dense(q, k, v, mask)
        site.stats.count("dense", 1.0, sparse=False)
    observer = site.session.observer
    if observer is not None and reason is None and observer.wants(call):
        _show(observer, call, q, k, v, mask, out)
    return out


def _outside(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """A call that no forward pass of the transformer made."""
    if not site.session.plan.is_dense:
        site.fell_back(_NO_PASS.format(site.transformer.name))
    with site.stats.timer.running(q.device):
        out = site.dense(q, k, v, over_all_tokens(mask, q.shape[1]))
    site.stats.count("dense", 1.0, sparse=False)
    return out


def _guarded(
    call: LayerCall,
    work: list[Work],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """The sparse output, or the dense one where the guard objects."""
    compare = call.watch.is_due(call.site.session.guard)
    result = None
    try:
        with told_to(call.site.fell_back):
            result = _sparse(call, work, q, k, v, hidden, compare=compare)
    except NoKernelError:
        pass
    except (RuntimeError, MemoryError) as error:  # of planning and compensation; kernels have their own way out
        if not is_passing(error):
            raise
        call.site.fell_back(f"planning failed ({in_words(error)})")
    if result is None:  # not while the error is handled: it keeps the tensors of where it was raised
        return _without_kernel(call, q, k, v, mask)
    out, density = result
    wrong = what_is_wrong(out, v, call.first_head)
    if wrong is not None:
        return _after_guard(call, q, k, v, mask, wrong)
    names = "+".join(dict.fromkeys(kernel.name for one in work for kernel, _ in one.groups))
    call.site.stats.count(names, density, sparse=True)
    return out


def _without_kernel(
    call: LayerCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The dense output of a call that could not be computed sparse; the reason is counted already."""
    call.context.run.forget(call.site)  # pattern and compensation may have remembered half a call
    out = call.run_dense(q, k, v, mask)
    call.site.stats.count("dense", 1.0, sparse=False)
    return out


def _show(
    observer: Observer,
    call: LayerCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Shows a dense call to the observer; what a sparse kernel could not have run is counted with its reason."""
    context, stats = call.context, call.site.stats
    if context.grid is None:
        stats.count_fallback(f"not observed: {context.dense_reason or 'the token grid is unknown'}")
        return
    parts = context.parts(q, mask)
    for part in (parts,) if isinstance(parts, str) else parts:
        sequence = part if isinstance(part, str) else context.sequence(part.valid)
        if isinstance(sequence, str):
            stats.count_fallback(f"not observed: {sequence}")
            return
        assert isinstance(part, Part)
        q_, k_, v_, out_ = (sequence.to_layout(part.take(x)) for x in (q, k, v, out))
        observer.observe(call, call.heads(sequence, q_, k_, v_), out_)


def passed_by(site: AttentionSite, reason: str) -> None:
    """Counts a call that never reached :func:`attend`, because it is no attention that a kernel here could run.

    Raises:
        StrictError: in a strict session, if the plan wanted this call sparse.
    """
    context, session = site.transformer.context, site.session
    if context is None or not session.policy(context.moment, site.transformer.name, site.layer).is_dense:
        site.fell_back((None if context is None else context.dense_reason) or reason)
    site.stats.count("dense", 1.0, sparse=False)


def _decide(
    call: LayerCall, q: torch.Tensor, mask: torch.Tensor | None, hidden: torch.Tensor | None
) -> tuple[list[Work], str | None]:
    """What to run sparse (nothing: dense), and a reason if that is not what the plan says."""
    context, session = call.context, call.site.session
    planned = session.policy(call.moment, call.site.transformer.name, call.site.layer)
    if planned.is_dense:
        return [], _UNNAMED if _wants_a_branch(call) else None
    heads = q.shape[2] if call.share is None else call.share.total
    excluded, policy = call.watch.reason(session.guard), call.watch.policy(planned, heads)
    if policy.is_dense:
        return [], excluded
    if context.grid is None:
        return [], context.dense_reason or "the token grid is unknown"
    if hidden is not None and hidden.shape[1] not in (q.shape[1], context.grid.tokens):
        return [], f"its trained gate is for {hidden.shape[1]} tokens, and the layer attends {q.shape[1]}"
    parts = context.parts(q, mask)
    if isinstance(parts, str):
        return [], parts
    work: list[Work] = []
    reasons: dict[str, None] = {} if excluded is None else {excluded: None}
    for part in parts:
        sequence = context.sequence(part.valid)
        if isinstance(sequence, str):
            return [], sequence
        one = Work(part, sequence, [])
        for group in session.groups(policy, heads, sequence.layout(q.device), call.share):
            request = group.request(q)
            choice = session.kernels.of(request, context.run)
            if choice.reason is not None:
                reasons[choice.reason] = None
            if choice.kernel is None:
                return [], choice.reason
            kernel = ChosenKernel(session.kernels, request, context.run, call.site.fell_back)
            one.groups.append((kernel, group))
        if not one.groups:  # this policy keeps everything
            return [], excluded
        work.append(one)
    return work, "; ".join(reasons) or None


def _wants_a_branch(call: LayerCall) -> bool:
    """Whether the plan may have a rule for this pass, if it were known which pass of guidance it is."""
    site, moment, plan = call.site, call.moment, call.site.session.plan
    if moment.branch is not None or moment.stream[0] is not None or not site.transformer.separate_guidance:
        return False
    return any(rule.branch is not None for rule in plan.rules) and any(
        not plan.lookup(moment.noise_level, site.transformer.name, site.layer, branch).is_dense for branch in BRANCHES
    )


def _sparse(
    call: LayerCall,
    work: list[Work],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    *,
    compare: bool,
) -> tuple[torch.Tensor, float]:
    """Runs every part of the batch; returns the output in the order the tokens came in, and the density."""
    (first, *others) = work
    if not others and first.part.valid == q.shape[1]:
        return _run(call, first, q, k, v, hidden, compare=compare)
    out, density = q.new_zeros(q.shape), 0.0
    for one in work:
        inputs = (None if x is None else one.part.take(x) for x in (q, k, v, hidden))
        result, kept = _run(call, one, *inputs, compare=compare)  # type: ignore[arg-type]
        density += one.part.share * kept
        if one.part.samples is None:
            out[:, : one.part.valid] = result
        else:
            out[one.part.samples, : one.part.valid] = result
    return out, density


def _run(
    call: LayerCall,
    work: Work,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    *,
    compare: bool,
) -> tuple[torch.Tensor, float]:
    """Runs every group on samples of one length; returns the output and its density."""
    q, k, v = (work.sequence.to_layout(x) for x in (q, k, v))
    if hidden is not None:
        sequence = work.sequence
        if hidden.shape[1] < sequence.tokens:  # other tokens join the video inside the layer; no gate is theirs
            hidden = F.pad(hidden, (0, 0, sequence.before, sequence.others - sequence.before))
        hidden = sequence.to_layout(hidden.to(q.device))  # an offloaded layer may take it on another device
    heads = call.heads(work.sequence, q, k, v, hidden)
    out: torch.Tensor | None = None
    density = 0.0
    for kernel, group in work.groups:
        # other blocks, other heads and samples of other lengths have memories of their own
        memory = call.memory((group.key, work.part.valid))
        result, kept = run_heads(kernel, group, group.of(heads), memory)
        density += group.share * kept
        if group.heads is None:  # the only group, so its output is the layer's
            out = result
        else:
            out = torch.empty_like(q) if out is None else out
            out.index_copy_(2, group.heads, result)
    assert out is not None  # there is at least one group
    if compare:
        _check(call, heads, out)
    return work.sequence.from_layout(out), density


def _check(call: LayerCall, heads: Heads, out: torch.Tensor) -> None:
    """Compares an output in layout order with exact attention; heads that are off run dense for the rest of the run."""
    site, watch, guard = call.site, call.watch, call.site.session.guard
    found = check_heads(guard, watch, heads, out)
    found = {head: error for head, error in found.items() if head not in watch.errors}
    if not found:
        return
    watch.exclude(found)
    call.context.run.forget(site)  # heads are grouped anew
    for head, error in found.items():
        site.session.say_once(
            f"guard: head {head} of {site.transformer.name} layer {site.layer} runs dense from step {call.moment.step}"
            f" on: its sampled relative error is {error:.3g}, above the limit {guard.limit:g}"
        )
    reason = watch.reason(guard)
    assert reason is not None
    site.fell_back(reason)


def _after_guard(
    call: LayerCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    wrong: str,
) -> torch.Tensor:
    """The same call again, dense, and the story told."""
    site = call.site
    where = f"{site.transformer.name} layer {site.layer}, step {call.moment.step}"
    site.fell_back(f"guard: {wrong}")
    site.session.say_once(f"guard: {wrong} at {where}; that call ran dense")
    call.context.run.forget(site)  # what the call left behind may be as bad
    out = call.run_dense(q, k, v, mask)
    still = what_is_wrong(out, v, call.first_head)
    if still is not None:
        # the input was bad already: attention cannot mend it, but nobody should blame the sparse kernel
        message = f"{where}: dense attention gives {still} too, so the input of this layer is at fault"
        if not is_bounded(out):
            message += "; its values that are not finite count as 0, and huge ones are cut"
            out = call.run_dense(bounded(q), bounded(k), bounded(v), mask)
        site.session.say_once(message)
        warnings.warn(message, VidaccelWarning, stacklevel=2)
    site.stats.count("dense", 1.0, sparse=False)
    return out
