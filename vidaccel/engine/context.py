"""What one forward pass of a transformer is about: where it stands in its run, and where its tokens are.

Two threads may run one transformer at once, so nothing of a pass lies on the model: each pass has a context of its own,
which the thread that runs it finds while it lasts.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..layout import TokenLayout
from ..types import TileShape, VideoGrid
from .runs import DenoisingRun, Moment
from .sequence import Part, Sequence, padding_of, parts_of

if TYPE_CHECKING:
    from .parallel import Ranks

__all__ = ["ForwardContext", "PatchedTransformer"]


@dataclass(eq=False)
class ForwardContext:
    """One forward pass.

    Args:
        moment: its noise level, step, branch and stream of passes.
        run: the run that it is of.
        grid: its token grid; ``None`` if it cannot run sparse, then ``dense_reason`` says why.
        tile: tile shape the plan asks for, or ``None`` to let the layout choose.
        tiled: whether the block stack sees its tokens in layout order (once per forward), or in raster order, so
            that each layer permutes for itself.
        joint: whether other tokens share the sequence with the video.
        before: how many of them precede it; ``None`` for all.
        ranks: the processes that share the sequence, if they do.
    """

    moment: Moment
    run: DenoisingRun
    grid: VideoGrid | None = None
    tile: TileShape | None = None
    tiled: bool = False
    dense_reason: str | None = None
    joint: bool = False
    before: int | None = 0
    ranks: Ranks | None = None
    _padding: dict[Any, tuple[torch.Tensor, tuple[Part, ...] | str]] = field(default_factory=dict)

    def layout(self, device: torch.device) -> TokenLayout:
        """Order of the video's tokens, on the device where it is needed (offloading moves layers)."""
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
        if key not in self._padding:
            found = padding_of(mask, batch, tokens)
            # the mask is kept, or another could take its place in memory
            self._padding[key] = mask, found if isinstance(found, str) else parts_of(found, q.device)
        return self._padding[key][1]


class PatchedTransformer:
    """One patched transformer, as the engine knows it.

    Args:
        name: the pipeline's name for it, ``"transformer"`` or ``"transformer_2"``.
        joint: whether other tokens share its sequence with the video.
        separate_guidance: whether the passes of guidance are forward passes of their own, and not one batch.
    """

    def __init__(self, name: str, *, joint: bool = False, separate_guidance: bool = False) -> None:
        self.name = name
        self.joint = joint
        self.separate_guidance = separate_guidance
        self._thread = threading.local()

    @property
    def context(self) -> ForwardContext | None:
        """The pass that runs in this thread, or ``None`` outside of one."""
        return getattr(self._thread, "context", None)

    @context.setter
    def context(self, context: ForwardContext | None) -> None:
        self._thread.context = context
