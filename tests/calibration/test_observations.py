"""The file of observations: means and spreads, whole or not at all, and nothing wrong ever accepted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vidaccel.calibration.cells import Cell, Place, Sample
from vidaccel.calibration.observations import Observations
from vidaccel.calibration.shape import Shape
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy
from vidaccel.errors import ConfigError, PlanFileError
from vidaccel.types import TileShape, VideoGrid

WINDOW = HeadPolicy(PatternSpec.make("sliding_tile", window=[1, 1, 1]))


def sample(random: np.random.Generator, heads: int = 2) -> Sample:
    each = [random.random((2, heads)).astype(np.float32) for _ in range(4)]
    return Sample(*each, random.random(heads).astype(np.float32))


def observations(prompts: int = 3) -> Observations:
    random = np.random.default_rng(0)
    seen = Observations(
        candidates=(HeadPolicy(), WINDOW),
        tile=TileShape(2, 2, 2),
        fingerprint=Fingerprint(model_class="Model", heads=2, layers=2, grid=VideoGrid(4, 4, 4)),
        edges=(0.0, 0.5, 1.0),
        steps=(2, 3),
        settings={"height": 32},
        times={"total": 2.0, "attention": 1.0},
        notes=["a note"],
        provenance={"device": "a device"},
    )
    places = [Place(b, t, layer, branch) for b in (0, 1) for t, layer in (("transformer", 0), ("transformer_2", 1))
              for branch in ("cond", "uncond")]  # fmt: skip
    for number in range(prompts):
        # another number of heads in the second transformer
        seen.add(f"key{number}", {p: sample(random, 2 + (p.transformer == "transformer_2")) for p in places})
    for place in seen.places():
        seen.weight[place] = 0.5 + place[0]
    return seen


def test_means_and_spread_are_those_of_the_prompts() -> None:
    random = np.random.default_rng(1)
    samples = [sample(random) for _ in range(5)]
    cell = Cell.empty(2, 2)
    for one in samples:
        cell.add(one)
    errors = np.stack([one.error for one in samples])
    np.testing.assert_allclose(cell.error, errors.mean(0), rtol=1e-5)
    np.testing.assert_allclose(cell.standard_error(), errors.std(0, ddof=1) / 5**0.5, rtol=1e-4)
    np.testing.assert_allclose(cell.energy, np.mean([one.energy for one in samples], axis=0), rtol=1e-5)
    one = Cell.empty(2, 2)
    one.add(samples[0])
    assert np.isinf(one.standard_error()).all()


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    seen, path = observations(), tmp_path / "o.safetensors"
    seen.save(path)
    found = Observations.load(path)
    for name in ("candidates", "tile", "fingerprint", "edges", "steps", "settings", "weight", "done", "times", "notes"):
        assert getattr(found, name) == getattr(seen, name), name
    assert found.provenance == seen.provenance and sorted(found.cells) == sorted(seen.cells)
    for place, cell in seen.cells.items():
        for name in ("error", "spread", "cosine", "mass", "density", "energy"):
            np.testing.assert_array_equal(getattr(found.cells[place], name), getattr(cell, name))
        assert found.cells[place].prompts == cell.prompts == 3
    # and goes on as if nothing had happened
    more = {place: sample(np.random.default_rng(7), cell.error.shape[1]) for place, cell in sorted(seen.cells.items())}
    found.add("key3", more)
    seen.add("key3", more)
    place = min(seen.cells)
    np.testing.assert_array_equal(found.cells[place].spread, seen.cells[place].spread)


def test_bins() -> None:
    seen = observations(1)
    assert [seen.bin_of(level) for level in (0.0, 0.3, 0.5, 0.500001, 1.0, 1.2)] == [0, 0, 0, 1, 1, 1]
    assert seen.places() == [(b, t, layer) for b in (0, 1) for t, layer in (("transformer", 0), ("transformer_2", 1))]
    total = seen.total((0, "transformer", 0), "error")
    parts = [seen.cells[Place(0, "transformer", 0, branch)].error for branch in ("cond", "uncond")]
    np.testing.assert_allclose(total, parts[0] + parts[1])


def test_every_truncation_and_flip_is_found(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    observations(1).save(path)
    raw = path.read_bytes()
    random = np.random.default_rng(2)
    for number in range(200):
        where = int(random.integers(len(raw)))
        changed = (
            raw[:where] if number % 2 else raw[:where] + bytes([raw[where] ^ (1 << number % 8)]) + raw[where + 1 :]
        )
        path.write_bytes(changed)
        if raw[where : where + 1] == b" ":  # safetensors pads its header with spaces, which mean nothing
            continue
        with pytest.raises(PlanFileError) as caught:
            Observations.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_plan_is_no_observations(tmp_path: Path) -> None:
    from vidaccel import Plan
    from vidaccel.configs.artifact import load_plan, save_plan

    save_plan(Plan.dense(), tmp_path / "plan.safetensors")
    with pytest.raises(PlanFileError, match="it is no observations: its kind is plan"):
        Observations.load(tmp_path / "plan.safetensors")
    observations(1).save(tmp_path / "o.safetensors")
    with pytest.raises(PlanFileError, match="it is no plan: its kind is observations"):
        load_plan(tmp_path / "o.safetensors")


def test_another_run_is_refused(tmp_path: Path) -> None:
    first, second = observations(1), observations(1)
    first.check_same(second, "o")
    second.edges, second.tile = (0.0, 0.4, 1.0), None
    with pytest.raises(ConfigError, match="a run with other tile, noise bins; use the same settings"):
        first.check_same(second, "o")
    second.settings = {"arguments": {"height": 64}, "bins": 3, "weights": "other"}
    with pytest.raises(ConfigError, match="a run with other generation settings, noise bins, .*weights; use the same"):
        first.check_same(second, "o")


def test_files_without_a_shape_can_be_read(tmp_path: Path) -> None:
    """Earlier versions did not store it."""
    seen = observations(1)
    assert seen.shape is None
    seen.save(tmp_path / "o.safetensors")
    assert Observations.load(tmp_path / "o.safetensors").shape is None
    seen.shape = Shape(2, 3, 64, "bfloat16", 5, True)
    seen.save(tmp_path / "o.safetensors")
    assert Observations.load(tmp_path / "o.safetensors").shape == seen.shape
    for wrong in ({"heads": 0}, {"dtype": "int7"}, {"text_tokens": -1}, {"text_first": 1}):
        with pytest.raises(ConfigError, match="is no shape"):
            replace(seen.shape, **wrong)
    with pytest.raises(ConfigError, match="lacks one of batch"):
        Shape.from_dict({"batch": 1})
