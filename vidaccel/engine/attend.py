"""One attention call, from policy to output: the only place that decides between sparse and dense.

    policy of this moment -> head groups -> kernel -> guard -> out

Every way out of the sparse path leaves its reason in the statistics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import StrictError, VidaccelWarning
from ..kernels.contract import Kernel, KernelRequest
from ..kernels.dispatch import select, why_not
from ..layout import TokenLayout
from ..types import PRECISIONS
from .guard import what_is_wrong
from .prepare import HeadGroup
from .stats import LayerStats

if TYPE_CHECKING:
    from .session import Session, TransformerState

__all__ = ["AttentionSite", "attend"]

#: ``dense(q, k, v, mask) -> out``, all [B, S, H, D]: what the unpatched layer would have run.
DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(eq=False)
class AttentionSite:
    """One patched attention layer: where it is, what it ran before, and its statistics."""

    session: Session
    state: TransformerState
    layer: int
    dense: DenseAttention
    stats: LayerStats


def attend(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Self-attention of one patched layer.

    Args:
        q, k, v: [B, S, H, D] after norms and RoPE, in raster order, or in layout order if ``site.state.tiled``.
        mask: attention mask the model passed, in raster order, or ``None``.

    Returns:
        [B, S, H, D], in the order the tokens came in.

    Raises:
        StrictError: in a strict session, if the plan wanted something else than what can run.
    """
    with site.stats.watch.running(q.device):
        groups, reason = _decide(site, q, mask)
        if reason is not None:
            site.session.refuse_if_strict(site, reason)
            site.stats.fallbacks[reason] += 1
        if not groups:
            out = _dense(site, q, k, v, mask)
            site.stats.count("dense", 1.0, sparse=False)
            return out
        layout = site.state.layout(q.device)
        out, names = _sparse(site, layout, groups, q, k, v)
        wrong = what_is_wrong(out, v)
        if wrong is not None:
            return _after_guard(site, q, k, v, wrong)
        density = sum(g.share * g.density for g in groups)
        site.stats.count("+".join(names), density, sparse=True)
        return out


def _decide(
    site: AttentionSite, q: torch.Tensor, mask: torch.Tensor | None
) -> tuple[tuple[HeadGroup, ...], str | None]:
    """Head groups to run sparse (empty: dense), and the reason if that is not what the plan says."""
    state = site.state
    if state.moment is None:
        return (), f"{state.name} was not entered through its forward pass, so the noise level is unknown"
    policy = site.session.policy(state.moment, state.name, site.layer)
    if policy.is_dense:
        return (), None
    if mask is not None:
        return (), "the model passed an attention mask, which no sparse kernel here can honour"
    if state.grid is None:
        return (), state.dense_reason or "the token grid is unknown"
    if q.shape[1] != state.grid.tokens:
        return (), (
            f"the layer sees {q.shape[1]} tokens where the grid {state.grid} has {state.grid.tokens}"
            " (a sharded or extended sequence)"
        )
    return site.session.groups(policy, q.shape[2], state.layout(q.device)), None


def _dense(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the unpatched layer runs. Token order does not matter to it, unless the model's mask has one."""
    if mask is None or not site.state.tiled:
        return site.dense(q, k, v, mask)
    layout = site.state.layout(q.device)
    return layout.tile(site.dense(layout.untile(q), layout.untile(k), layout.untile(v), mask))


def _sparse(
    site: AttentionSite,
    layout: TokenLayout,
    groups: tuple[HeadGroup, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> tuple[torch.Tensor, list[str]]:
    """Runs every group's kernel; returns the output in the order the tokens came in, and the kernels' names."""
    if not site.state.tiled:
        q, k, v = layout.tile(q), layout.tile(k), layout.tile(v)
    names: list[str] = []
    out: torch.Tensor | None = None
    for group in groups:
        kernel, group = _kernel(site, group, q)
        part = (q, k, v) if group.heads is None else tuple(x.index_select(2, group.heads) for x in (q, k, v))
        result = kernel(*part, layout, group.mask, precision=group.precision, tail=group.tail)
        assert isinstance(result, torch.Tensor)
        if group.heads is None:
            out = result
        else:
            out = torch.empty_like(q) if out is None else out
            out.index_copy_(2, group.heads, result)
        if kernel.name not in names:
            names.append(kernel.name)
    assert out is not None
    return (out if site.state.tiled else layout.untile(out)), names


def _kernel(site: AttentionSite, group: HeadGroup, q: torch.Tensor) -> tuple[Kernel, HeadGroup]:
    """The kernel for a group; where this device lacks the precision, the next best, said once and counted."""
    request = KernelRequest(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        precision=group.precision,
        tail=group.tail,
        return_lse=False,
    )
    session = site.session
    known = session.kernels.get(request)
    if known is None:
        obstacle = why_not(request, prefer=session.kernel) if group.precision.quantised else None
        if obstacle is not None:
            native = replace(request, precision=PRECISIONS["native"])
            known = select(native, prefer=session.kernel), obstacle
        else:
            known = select(request, prefer=session.kernel), None
        session.kernels[request] = known
    kernel, obstacle = known
    if obstacle is None:
        return kernel, group
    reason = f"precision {group.precision.name} ran in the model's own dtype: {obstacle}"
    session.refuse_if_strict(site, reason)
    session.say_once(reason)
    site.stats.fallbacks[reason] += 1
    return kernel, replace(group, precision=PRECISIONS["native"])


def _after_guard(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wrong: str
) -> torch.Tensor:
    """The same call again, dense, and the story told."""
    state = site.state
    assert state.moment is not None
    where = f"{state.name} layer {site.layer}, step {state.moment.step}"
    site.session.refuse_if_strict(site, wrong)
    site.stats.fallbacks[f"guard: {wrong}"] += 1
    site.session.say_once(f"guard: {wrong} at {where}; that call ran dense")
    out = _dense(site, q, k, v, None)
    still = what_is_wrong(out, v)
    if still is not None:
        # the input was bad already: attention cannot mend it, but nobody should blame the sparse kernel
        message = f"{where}: dense attention gives {still} too, so the input of this layer is at fault"
        site.session.say_once(message)
        warnings.warn(message, VidaccelWarning, stacklevel=2)
    site.stats.count("dense", 1.0, sparse=False)
    return out


def strict_message(site: AttentionSite, reason: str) -> StrictError:
    """The error of a strict session."""
    return StrictError(
        f"{site.state.name} layer {site.layer} cannot run as the plan says: {reason};"
        " patch with strict=False to run it dense and have it reported"
    )
