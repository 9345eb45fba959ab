"""A family that does not fit its model is told so, at patch time where that can be seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import vidaccel
from examples import custom_family
from tests.zoo.wan import CASES
from vidaccel import VidaccelWarning, VideoGrid
from vidaccel.errors import PatchError
from vidaccel.patchers import registry
from vidaccel.patchers.base import Family


class Mine(Family):
    name = "mine"
    transformers = ("MyVideoTransformer",)
    pipelines = ()
    layers = ("blocks.*.attn",)
    processors = ("MyProcessor",)
    separate_guidance = False

    def grid(self, model: Any, call: Mapping[str, Any]) -> VideoGrid | str:
        return VideoGrid(*call["video"].shape[2:])


@pytest.fixture(autouse=True)
def _families() -> Iterator[None]:
    """The registry as it was."""
    before = list(registry._registered)
    yield
    registry._registered[:] = before


def model() -> nn.Module:
    return custom_family.MyVideoTransformer(dim=24).eval()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("blokcs.*.attn",), r"no attention at blokcs\.\*\.attn; correct `layers` of the family 'mine'"),
        (("blocks.*.attention",), r"no attention at blocks\.\*\.attention \(.*attention.*\); correct `layers`"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_family_that_names_no_module_is_an_error(layers: tuple[str, ...], message: str, strict: bool) -> None:
    registry.register_family(type("Wrong", (Mine,), {"layers": layers})())
    mine = model()
    with pytest.raises(PatchError, match=message):
        vidaccel.patch(mine, "sta", strict=strict)
    assert vidaccel.session_of(mine) is None and not mine._forward_pre_hooks


class Foreign:
    """Somebody else's processor around the model's own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_model_of_which_no_layer_can_be_patched_is_told() -> None:
    pipe = CASES[0].make()
    first, *others = (block.attn1 for block in pipe.transformer.blocks)
    first.processor = Foreign(first.processor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VidaccelWarning)
        vidaccel.patch(pipe, "sta")  # one layer alone is in the report only
    vidaccel.unpatch(pipe)
    for attn in others:
        attn.processor = Foreign(attn.processor)
    with pytest.warns(
        VidaccelWarning, match=r"none of the 2 attention layers of transformer .* processor is a Foreign"
    ):
        session = vidaccel.patch(pipe, "sta")
    assert [entry["module"] for entry in session.report().not_patched[:2]] == [
        "transformer.blocks.0.attn1",
        "transformer.blocks.1.attn1",
    ]
    vidaccel.unpatch(pipe)
    with pytest.raises(vidaccel.StrictError, match="Foreign"):
        vidaccel.patch(pipe, "sta", strict=True)


def test_a_model_without_a_timestep_names_what_to_override() -> None:
    class Timeless(custom_family.MyVideoTransformer):
        def forward(self, video: torch.Tensor, noise: float) -> torch.Tensor:  # type: ignore[override]
            return super().forward(video, torch.tensor([noise]))

    registry.register_family(Mine())
    mine, video = Timeless(dim=24).eval(), torch.randn(1, 24, 2, 4, 4)
    vidaccel.patch(mine, "sta")
    with pytest.raises(PatchError, match=r"called without `timestep` \(it got video, noise\); override Family"):
        mine(video, 0.5)
    vidaccel.unpatch(mine)

    registry.register_family(type("Named", (Mine,), {"timestep": lambda self, call, scheduler: 1000 * call["noise"]})())
    session = vidaccel.patch(mine, "sta")
    with torch.no_grad():
        mine(video, 0.5)
    assert session.report().calls == 6


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    custom_family.main()
    told = capsys.readouterr().out
    assert "the same bit for bit: True" in told and "torch-sparse x1" in told


def test_a_family_can_be_taken_out_again() -> None:
    mine = Mine()
    registry.register_family(mine)
    assert registry.family_of(model()) is mine
    registry.unregister_family(mine)
    assert registry.family_of(model()) is None and mine not in registry.families()
    with pytest.raises(PatchError, match="the family 'mine' is not registered"):
        registry.unregister_family(mine)
