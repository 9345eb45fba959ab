"""The systems' table: settings that match a density, and the words of the table. Generations are not run here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import systems
from benchmarks.precision import GRID, HEAD_DIM, HEADS, Tensors
from benchmarks.systems import SYSTEMS, Row, density_of, match, plan_of, table
from vidaccel.configs.presets import preset_names
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_pattern


@pytest.fixture(scope="module")
def samples() -> list[Tensors]:
    """Random calls with structure from tile to tile, where captured ones would need the model."""
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.of(GRID, systems.TILE)

    def tensor() -> torch.Tensor:
        blocks = torch.randn(1, layout.num_blocks, HEADS, HEAD_DIM, generator=generator)
        tokens = torch.randn(1, layout.tokens, HEADS, HEAD_DIM, generator=generator)
        return blocks[:, layout.block_of_token] + 0.5 * tokens

    return [(tensor(), tensor(), tensor())]


@pytest.mark.parametrize("name", SYSTEMS)
def test_settings_are_found_for_a_density(name: str, samples: list[Tensors]) -> None:
    """Within the steps that a system can make: rows of tiles for sta, bands for svg, no margin at all for anchor."""
    system = SYSTEMS[name]
    spec = match(system, 0.35, samples)
    coarse = {"sta": 0.1, "svg": 0.1, "anchor": 0.05}
    assert density_of(spec, samples, system.tile) == pytest.approx(0.35, abs=coarse.get(name, 0.03))


def test_more_of_the_knob_keeps_more(samples: list[Tensors]) -> None:
    for name in ("sta", "vsa-free", "nabla", "sale", "anchor", "xattention"):
        system = SYSTEMS[name]
        found = [density_of(system.make(system.low + t * (system.high - system.low)), samples, system.tile)
                 for t in (0.0, 0.3, 0.7, 1.0)]  # fmt: skip
        assert found == sorted(found) and found[0] < found[-1]


def test_systems_are_presets_or_patterns_on_their_way_to_one() -> None:
    assert set(SYSTEMS) - set(preset_names()) == {"anchor", "hash"}
    for system in SYSTEMS.values():
        build_pattern(system.make(system.high))
        plan = plan_of(system.make(system.high), system.tile)
        assert plan.lookup(0.95, "transformer", 0, None).is_dense
        assert not plan.lookup(0.9, "transformer", 0, None).is_dense


def test_the_table_is_ordered_by_density_and_quality() -> None:
    rows = [
        Row("a", "p", "native", 0.2, 0.21, 18.0, 0.6, 0.4, 0.1, 8),
        Row("b", "p", "native", 0.5, 0.5, 22.0, 0.8, 0.2, 0.1, 8),
        Row("c", "p", "native", 0.5, 0.5, 25.0, 0.9, 0.1, 0.05, 8),
    ]
    lines = table(rows).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["c", "b", "a"]
    assert lines[2].startswith("| `c` | native | 0.50 | 0.500 | 25.0 | 0.900 | 0.100 | 5% |")
    assert math.isnan(systems._mean([None]))


def test_unknown_systems_are_named() -> None:
    assert Path(systems.PROMPTS).is_file()
    with pytest.raises(ConfigError, match="no system is called nope; valid are sta, vsa-free"):
        systems.measure(["nope"], [0.5])
