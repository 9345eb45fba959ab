"""Fingerprints: what counts as a difference, and in which words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from tests.configs.strategies import fingerprints
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.errors import ConfigError
from vidaccel.types import VideoGrid

MADE = Fingerprint.make(
    {"patch_size": [1, 2, 2], "dim": 5120},
    model_class="WanTransformer3DModel",
    heads=40,
    layers=30,
    grid=VideoGrid(21, 30, 52),
    scheduler="UniPC",
    vidaccel="0.1.0",
)


def test_every_difference_has_its_phrase() -> None:
    here = Fingerprint.make(
        {"patch_size": (1, 1, 1), "dim": 5120, "extra": 3},
        model_class="CogVideoX",
        heads=30,
        layers=20,
        grid=VideoGrid(13, 30, 45),
        scheduler="DDIM",
        vidaccel="0.2.0",
    )
    assert MADE.differences(here) == [
        "model class is CogVideoX, the plan was made for WanTransformer3DModel",
        "number of heads is 30, the plan was made for 40",
        "number of layers is 20, the plan was made for 30",
        "token grid is 13x30x45, the plan was made for 21x30x52",
        "scheduler is DDIM, the plan was made for UniPC",
        "config patch_size is (1, 1, 1), the plan was made for (1, 2, 2)",
        "vidaccel is 0.2.0, the plan was made by 0.1.0",
    ]


def test_what_is_unknown_or_a_patch_release_is_no_difference() -> None:
    assert MADE.differences(MADE) == []
    assert MADE.differences(Fingerprint()) == []
    assert Fingerprint().differences(MADE) == []
    assert MADE.differences(Fingerprint.make({"dim": None, "other": 1}, vidaccel="0.1.7")) == []


@given(fingerprints)
def test_data_round_trip(made: Fingerprint) -> None:
    again = Fingerprint.from_data(json.loads(json.dumps(made.to_data())))
    assert again == made
    assert hash(again) == hash(made)
    assert made.differences(again) == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, "a fingerprint is 3; give a mapping"),
        ({"headz": 3}, "unknown keys headz; valid are model_class"),
        ({"heads": "3"}, "Fingerprint.heads is '3'"),
        ({"layers": 0}, "Fingerprint.layers is 0"),
        ({"grid": [1, 2]}, "give [frames, height, width]"),
        ({"grid": [1, 2, 0]}, "VideoGrid.width is 0"),
        ({"config": [1]}, "Fingerprint.config is [1]"),
        ({"config": {"a": {"b": 1}}}, "Fingerprint.config holds {'b': 1}"),
        ({"config": {3: 1}}, "all must be text"),
        ({"scheduler": 1}, "Fingerprint.scheduler is 1"),
    ],
)
def test_bad_data(data: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Fingerprint.from_data(data)
    assert says in str(caught.value)


def test_a_bare_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="give VideoGrid"):
        Fingerprint(grid=(1, 2, 3))
