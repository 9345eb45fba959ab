"""What a family of video transformers says about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import PatchError
from ..types import VideoGrid
from .order import TokenOrder
from .redirect import SparseProcessor, redirected

__all__ = ["AUDIO", "PROMPT", "REFINER", "Family", "TokenOrder", "grid_of"]


#: Reasons that many families share.
PROMPT = "cross-attention to the prompt"
REFINER = "attention among prompt tokens"
AUDIO = "the audio stream"


def grid_of(latents: torch.Tensor, patch: Sequence[int]) -> VideoGrid | str:
    """Token grid of latents [B, C, T, H, W] cut into patches, or one sentence on why they have none."""
    if latents.dim() != 5:
        return f"hidden_states has {latents.dim()} axes instead of 5"
    return VideoGrid(*(size // edge for size, edge in zip(latents.shape[2:], patch, strict=True)))


class Family(ABC):
    """One kind of video transformer. A subclass says what is special; :mod:`.patching` does the rest.

    Attributes:
        name: short name for tables.
        transformers: class names of the transformers, as diffusers spells them. Matched by name, because copies of a
            class in other modules are not subclasses.
        pipelines: class names of the pipelines that use them.
        layers: where the video self-attention sits, as ``stack.*.path`` with a list of blocks for the star.
        processors: class names of the attention processors we know how to replace.
        forget: local variables of those processors that build a mask, see :func:`~.redirect.redirected`.
        token_order: where the video tokens sit in the sequence.
        joint: whether other tokens share the video's self-attention. They attend everything and are always attended.
        dense: attention that is never touched: (module, why).
        dense_pipelines: those of ``pipelines`` that stay dense: (class name, why).
        separate_guidance: whether the unconditional pass is a second forward pass (and not half of the batch).
        fps: frames per second its videos are meant to be played at; ``None`` if nobody knows.
        fps_of: the same of those of ``pipelines`` that have another rate.
        needs: what those of ``pipelines`` cannot do without though their calls have a default for it: some names of
            arguments each time, of which one is enough.
        times_frame_rate: of those that return more frames a second than their argument says: how many times as many.

    Models are typed ``Any``, because the attributes that make a transformer are diffusers' own and untyped.
    """

    name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]
    pipelines: ClassVar[tuple[str, ...]]
    layers: ClassVar[tuple[str, ...]]
    processors: ClassVar[tuple[str, ...]]
    forget: ClassVar[frozenset[str]] = frozenset()
    token_order: ClassVar[str] = "video only"
    joint: ClassVar[bool] = False
    dense: ClassVar[tuple[tuple[str, str], ...]] = ()
    dense_pipelines: ClassVar[tuple[tuple[str, str], ...]] = ()
    separate_guidance: ClassVar[bool]
    fps: ClassVar[float | None] = None
    fps_of: ClassVar[Mapping[str, float]] = {}
    times_frame_rate: ClassVar[Mapping[str, float]] = {}
    needs: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {}

    def matches(self, model: object) -> bool:
        """Whether ``model`` is a transformer of this family, or a subclass of one."""
        return any(cls.__name__ in self.transformers for cls in type(model).__mro__)

    def attention_layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """(qualified name, module) of each video self-attention, in layer order."""
        for pattern in self.layers:
            stack, _, path = pattern.partition(".*.")
            for index, block in enumerate(getattr(model, stack, ())):
                yield f"{stack}.{index}.{path}", block.get_submodule(path)

    def left_alone(self, model: Any) -> Iterator[dict[str, str]]:
        """Attention that is dense by design, as {"module", "reason"} for the report."""
        for module, reason in self.dense:
            part = getattr(model, module.split(".")[0], None)
            empty = part is None or (isinstance(part, nn.ModuleList) and not len(part))
            if module.startswith("*") or not empty:
                yield {"module": module, "reason": f"{reason}, dense by design"}

    def frame_rate(self, pipe: Any) -> float | None:
        """Frames per second that a pipeline of this family makes videos for, where its call does not say."""
        return next((self.fps_of[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in self.fps_of), self.fps)

    def heads_of(self, module: Any) -> int:
        """Heads of one of those modules."""
        return int(getattr(module, "heads", None) or module.num_heads)

    @abstractmethod
    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        """Token grid of a forward call given its arguments by name, or one sentence on why it cannot be known."""

    def before(self, model: Any, call: Mapping[str, Any]) -> int | None:
        """How many tokens that are not video precede it in the layers' sequence; ``None`` for all of them."""
        return 0

    def timestep(self, call: Mapping[str, Any], scheduler: Any) -> torch.Tensor | float:
        """The call's timestep as the scheduler counts it, see :mod:`vidaccel.engine.noise_level`.

        Raises:
            PatchError: if the model is called without an argument of that name.
        """
        if "timestep" not in call:
            raise PatchError(
                f"a model of the family {self.name!r} was called without `timestep` (it got {', '.join(call)});"
                " override Family.timestep to say where it is"
            )
        return call["timestep"]  # type: ignore[no-any-return]

    def tiles_once(self, model: Any, call: Mapping[str, Any]) -> bool:
        """Whether reordering tokens outside the block stack is safe for this call. Else every layer reorders."""
        return False

    def processor(self, original: Any) -> SparseProcessor:
        """Our processor in place of ``original``.

        Raises:
            PatchError: if its attention call cannot be redirected.
        """
        return redirected(type(original), self.forget)(original)  # type: ignore[arg-type]

    def order_hooks(self, model: Any, order: TokenOrder) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Registers the hooks that reorder tokens once per forward pass."""
        yield from ()
