"""Predicted costs of a GPU that is not here, and the ceiling on what a plan can gain."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidaccel.calibration.cost import Costs
from vidaccel.calibration.predicted import ceiling, find_gpu, predict_costs, say_ceiling
from vidaccel.configs import HeadPolicy, PatternSpec
from vidaccel.errors import ConfigError, KernelError
from vidaccel.layout import TokenLayout
from vidaccel.types import VideoGrid

LAYOUT = TokenLayout.of(VideoGrid(12, 20, 30), text_tokens=40)
WIDE = HeadPolicy(PatternSpec.make("sliding_tile", window=(1.0, 0.7, 0.7)))
NARROW = HeadPolicy(PatternSpec.make("sliding_tile", window=(0.5, 0.3, 0.3)))


def predicted(policies: list[HeadPolicy], device: str = "NVIDIA H200") -> Costs:
    return predict_costs(policies, LAYOUT, heads=12, head_dim=128, batch=1, dtype=torch.bfloat16, device=device)


def test_sparse_and_narrow_formats_are_faster() -> None:
    tail = replace(NARROW, compensation="pooled_tail")
    eight = HeadPolicy(precision="fp8-tile")
    found = predicted([HeadPolicy(), WIDE, NARROW, tail, eight])
    assert (found.origin, found.device) == ("predicted", "NVIDIA H200")
    assert found.seconds(NARROW) < found.seconds(tail) < found.seconds(WIDE) < found.dense
    assert found.seconds(eight) < found.dense and HeadPolicy() not in found.table


def test_run_time_patterns_are_predicted_by_their_density() -> None:
    few, many = (HeadPolicy(PatternSpec.make("pooled_top_k", density=d)) for d in (0.2, 0.6))
    found = predicted([few, many])
    assert found.seconds(few) < found.seconds(many) < found.dense


@pytest.mark.parametrize("name", ["H200", "NVIDIA H200", "nvidia h200 sxm", "NVIDIA H200 141GB HBM3e"])
def test_names_of_one_gpu(name: str) -> None:
    assert find_gpu(name).arch == 90


def test_names_of_others() -> None:
    assert find_gpu("NVIDIA A100-SXM4-80GB").arch == 80
    assert find_gpu("NVIDIA GeForce RTX 4090").arch == 89
    for unknown in ("A10", "RTX", "H20", ""):
        with pytest.raises(ConfigError, match=r"nothing is known about a GPU .*; known are A100 SXM 80 GB, RTX 3090"):
            find_gpu(unknown)


def test_what_a_gpu_cannot_run_is_named() -> None:
    with pytest.raises(KernelError, match=r"dense fp8-tile on A100 SXM 80 GB cannot be .* needs 8.9 or later"):
        predicted([HeadPolicy(precision="fp8-tile")], "A100")


@given(st.floats(0.01, 1e6), st.floats(0, 1), st.floats(0.001, 1))
def test_the_ceiling_is_what_the_best_candidate_everywhere_gives(total: float, share: float, ratio: float) -> None:
    attention = total * share
    limit = ceiling(total, attention, ratio)
    left = total - attention + attention * ratio
    assert limit == pytest.approx(total / left) and 1 <= limit <= 1 / ratio * (1 + 1e-9)


def test_the_ceiling_in_words() -> None:
    assert ceiling(10.0, 5.0, 0.2) == pytest.approx(10 / 6)
    worth, idle = say_ceiling(10.0, 5.0, 0.2), say_ceiling(10.0, 0.5, 0.2)
    assert "takes 50% of a dense generation" in worth and "no plan can be faster than 1.67x" in worth
    assert "nothing to win" not in worth and "1.04x end to end. There is nothing to win here" in idle


@pytest.mark.parametrize("wrong", [(0.0, 0.0, 0.5), (1.0, 2.0, 0.5), (1.0, 0.5, 0.0), (1.0, 0.5, 1.1), (math.nan,) * 3])
def test_impossible_shares_are_named(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="valid is 0 <= attention <= total"):
        ceiling(*wrong)
