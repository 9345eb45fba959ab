"""A family's token places against the model itself: one piece of the latents is moved, and the tokens that move are it.

The oracle of ``test_zoo.py`` believes the family's grid and what precedes the video. Here neither is used to find the
token: the unpatched model's first self-attention is watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.patchers.test_zoo import OLDER, SPARSE
from tests.zoo.case import Case
from tests.zoo.watch import GRID, VideoAttention
from vidaccel import VideoGrid
from vidaccel.patchers.registry import families
from vidaccel.pipelines.patch import find_transformers

PLACE = (2, 1, 3)  # frame, row and column of the moved token
#: Where time, height and width are in ``hidden_states``; [B, C, T, H, W] if not named.
AXES = {"cogvideox": (1, 3, 4), "anyflow": (1, 3, 4), "kandinsky5": (1, 2, 3), "kandinsky6": (1, 2, 3)}
#: Frames before the video in ``hidden_states``.
FIRST = {"wan-animate": 1}
#: Variants whose places are others than those of their family's first row.
ALSO = ("CogVideoXPipeline-1.5", "WanVACEPipeline", "LTX2InContextPipeline", "HunyuanVideo15ImageToVideoPipeline")


class _Seen(Exception):
    """Ends a forward pass."""


def first_query(model: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """Query [B, H, S, D] of the model's first video self-attention."""
    found: list[torch.Tensor] = []

    def seen(query: torch.Tensor) -> None:
        found.append(query.clone())
        raise _Seen

    with VideoAttention(seen), torch.no_grad(), pytest.raises(_Seen):
        model(**call)
    return found[0]


def first_call(case: Case, pipe: Any, model: Any) -> dict[str, Any]:
    """The arguments of the pipeline's first forward pass, by name."""
    found: dict[str, Any] = {}

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        found.update(inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments)
        raise _Seen

    hook = model.register_forward_pre_hook(enter, with_kwargs=True)
    with pytest.raises(_Seen):
        case.run(pipe)
    hook.remove()
    del found["self"]
    return found | found.pop("kwargs", {})


def moved(latents: torch.Tensor, family: str) -> torch.Tensor:
    """``latents`` with the patch at ``PLACE`` changed."""
    out = latents.clone()
    if out.dim() == 3:  # [B, S, C]: the pipeline has cut the patches, frame after frame and row after row
        out[:, (PLACE[0] * GRID[1] + PLACE[1]) * GRID[2] + PLACE[2]] += 1
        return out
    index: list[slice] = [slice(None)] * 5
    for (axis, first, edge), at in zip(cuts(out, family), PLACE, strict=True):
        index[axis] = slice(first + at * edge, first + (at + 1) * edge)
    out[tuple(index)] += 1
    return out


def cuts(latents: torch.Tensor, family: str) -> list[tuple[int, int, int]]:
    """(axis, where the video begins, edge of a patch) for time, height and width of five-dimensional latents."""
    found = []
    for axis, first, tokens in zip(AXES.get(family, (2, 3, 4)), (FIRST.get(family, 0), 0, 0), GRID, strict=True):
        edge, rest = divmod(latents.shape[axis] - first, tokens)
        assert rest == 0
        found.append((axis, first, edge))
    return found


def rows() -> list[Case]:
    """The first row of each family, and the variants."""
    first = [
        next((case for case in SPARSE if case.pipeline.split("-")[0] in family.pipelines), None)
        for family in families()
        if family.pipelines
    ]
    assert OLDER or None not in first
    return [case for case in first if case] + [case for case in SPARSE if case.pipeline in ALSO]


@pytest.mark.parametrize("case", rows(), ids=str)
def test_a_moved_patch_moves_the_token_that_the_family_names(case: Case) -> None:
    pipe = case.make()
    _, model, family = find_transformers(pipe)[0]
    call = first_call(case, pipe, model)
    query, other = (
        first_query(model, call | {"hidden_states": latents})
        for latents in (call["hidden_states"], moved(call["hidden_states"], family.name))
    )
    tokens = (query != other).any(-1).any(1)[0].nonzero().flatten().tolist()

    named = {"self": model, **call}
    grid = family.grid(model, named)
    assert isinstance(grid, VideoGrid) and (grid.frames, grid.height, grid.width) == GRID
    before = family.before(model, named)
    if before is None:
        before = query.shape[2] - grid.tokens
    assert query.shape[2] >= before + grid.tokens
    assert tokens == [before + (PLACE[0] * grid.height + PLACE[1]) * grid.width + PLACE[2]]

    latents = call["hidden_states"]
    if latents.dim() == 5:  # time and height are equally long in the zoo: a longer video tells them apart
        axis, _, edge = cuts(latents, family.name)[0]
        longer = torch.cat([latents, latents.narrow(axis, 0, edge)], dim=axis)
        assert family.grid(model, named | {"hidden_states": longer}) == VideoGrid(GRID[0] + 1, *GRID[1:])
