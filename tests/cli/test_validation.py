"""Validation runs: dense once, and nothing that would not end in time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.tiny_wan import tiny_wan
from vidaccel.cli.progress import Progress
from vidaccel.cli.validation import Validation
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, Plan
from vidaccel.pipelines import generate as generation
from vidaccel.pipelines.generate import Request
from vidaccel.types import TileShape

SMALL = {"height": 48, "width": 64, "num_frames": 17, "num_inference_steps": 2, "max_sequence_length": 16}
REQUESTS = [Request(text, 7, SMALL) for text in ("a red ball", "a blue cat")]
WINDOWS = [PatternSpec.make("sliding_tile", window=window) for window in ([1, 1, 1], [1.0, 1, 1])]
PLANS = [replace(Plan.uniform(str(spec), HeadPolicy(spec)), tile=TileShape(2, 2, 2)) for spec in WINDOWS]

Told = list[tuple[str, int, int]]


def validation(left: float) -> tuple[Validation, Told]:
    """One with so many generations of time, which its runs do not use up."""
    told: Told = []

    def tell(*what: Any) -> None:
        told.append(what)  # type: ignore[arg-type]

    found = Validation(tiny_wan(), REQUESTS, seconds=1.0, left=lambda: left, tell=tell)
    return found, told


def test_every_request_runs_dense_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Request] = []
    original = generation.generate

    def counted(pipe: Any, request: Request) -> Any:
        ran.append(request)
        return original(pipe, request)

    monkeypatch.setattr("vidaccel.quality.compare.generate", counted)
    monkeypatch.setattr("vidaccel.pipelines.generate.generate", counted)
    found, told = validation(100)
    first, second, again = found.run(PLANS[0]), found.run(PLANS[1]), found.run(PLANS[0])
    # two dense runs and two by each plan, and of the first request dense again and with one step fewer
    assert len(ran) == 2 + 3 * 2 + 2
    errors = [[pair.quality["latent_error"] for pair in pairs] for pairs in (first, second, again)]
    assert errors[0] == errors[2] != errors[1] and 0 < errors[0][0] != errors[0][1]
    assert all(a.dense is b.dense for a, b in zip(first, second, strict=True))
    assert again[0].controls == first[0].controls and len(first[0].controls) == 2
    assert first[0].report.density != second[0].report.density and not found.notes
    assert told == [("validate", 1, 2), ("validate", 2, 2)] * 3


@pytest.mark.parametrize(
    ("left", "pairs", "controls", "note"),
    [
        (1, 0, 0, "the time was up before validation"),
        (2, 2, 0, "no time for the control runs"),
        (4, 2, 2, ""),
    ],
)
def test_no_run_that_would_not_end_in_time(left: int, pairs: int, controls: int, note: str) -> None:
    found, _ = validation(left)
    made = found.run(PLANS[0])
    assert len(made) == pairs and note in " ".join(found.notes) and bool(found.notes) == bool(note)
    assert not made or len([name for name in made[0].controls if name != "dense, another prompt"]) == controls


def test_the_time_may_end_between_two() -> None:
    seconds = iter([2.5, 2.5, 1.5, 0.5])
    found = Validation(tiny_wan(), REQUESTS, seconds=1.0, left=lambda: next(seconds), tell=lambda *_: None)
    assert len(found.run(PLANS[0])) == 1
    assert found.notes[-1] == "the time was up after validating 1 of 2 prompts"
    assert found.bounded(iter("abc"), "single heads", 3) == []
    assert found.notes[-1] == "the time was up after 0 of 3 single heads"


def test_bounded_ends_with_the_items() -> None:
    found, told = validation(5)
    assert found.bounded(iter("ab"), "single heads", 3) == ["a", "b"] and not found.notes
    assert told == [("single heads", 1, 3), ("single heads", 2, 3)]


def test_what_is_known_is_computed_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that draws used to read observations while they were written to."""
    progress = Progress((0.5,))
    monkeypatch.setattr(progress._bars, "disable", False)
    asked: list[int] = []

    def standing() -> list[tuple[str, int, list[float]]]:
        asked.append(1)
        return [("0 to 1", 1, [0.25])]

    progress.watch(standing)
    assert progress._known() == [] and not asked
    progress.tell("observe", 1, 2)
    assert len(asked) == 1
    (table,) = progress._known()
    assert table.row_count == 1 and len(asked) == 1
