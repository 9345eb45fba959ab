"""The table of compensations: its windows, what counts for a rule that remembers, and its words."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compensations import RULES, WINDOWS, Row, call_of, errors_of, one, table
from benchmarks.precision import Tensors, gaussian
from vidaccel.compensation import Rettention, build_compensation
from vidaccel.configs.pattern_spec import PatternSpec


@pytest.fixture(scope="module")
def sample() -> Tensors:
    return gaussian(torch.Generator().manual_seed(0))


def test_windows_keep_what_their_column_says(sample: Tensors) -> None:
    for aimed, spec in WINDOWS.items():
        assert call_of(sample, spec, {}).share == pytest.approx(aimed, abs=0.002)
    for aimed in (0.5, 0.25):
        found = call_of(sample, PatternSpec.make("pooled_top_k", density=aimed), {}).share
        assert found == pytest.approx(aimed, abs=0.01)


def test_every_rule_of_the_table_can_be_built() -> None:
    assert len({build_compensation(spec) for spec in RULES}) == len(RULES)


def test_full_steps_do_not_count_for_the_error_but_for_the_pairs(sample: Tensors) -> None:
    """Nothing changes between these steps, so without growth what is left behind is exact."""
    error, density, kept = one(Rettention(period=5, growth=0.0), WINDOWS[0.11], [[sample] * 5])
    assert error < 1e-5
    assert density == pytest.approx(kept + 0.2)
    dropped = one(build_compensation(RULES[0]), WINDOWS[0.11], [[sample] * 5])
    assert dropped[0] == pytest.approx(sum(errors_of(call_of(sample, WINDOWS[0.11], {}).sparse(), sample)) / 3)


def test_the_least_error_of_a_column_is_bold() -> None:
    rows = [Row("a", "window", 0.5, 0.5, 0.5, 0.2), Row("b", "window", 0.5, 0.5, 0.516, 0.1)]
    assert table(rows).splitlines() == [
        "| Compensation | pairs | window 0.50 |",
        "|---|---|---|",
        "| `a` | 0 | 0.200 |",
        "| `b` | +0.016 | **0.100** |",
    ]
