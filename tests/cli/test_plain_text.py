"""Texts reach the terminal as they are, whatever rich would read in them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import vidaccel.cli
from tests.report.results import comparison
from vidaccel import report
from vidaccel.cli.console import console
from vidaccel.cli.main import app
from vidaccel.configs.artifact import save_plan
from vidaccel.configs.presets import load_preset

MARKUP = "my [/bold] plan [red] :smile: [link=x]"
WIDE = {"COLUMNS": "400"}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _squeezed(text: str) -> str:
    """Without the frames and line breaks of the help's tables."""
    return re.sub(r"[\s│]+", " ", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default(vidaccel: Callable[..., Any], name: str) -> None:
    shown = _squeezed(vidaccel(name, "--help", env=WIDE).stdout)
    for param in COMMANDS[name].params:
        for words in re.findall(r"\[default: [^]]*\]", getattr(param, "help", None) or ""):
            assert words in shown, (param.name, words)
        if isinstance(param.default, int | float | str | Path) and not isinstance(param.default, bool):
            assert f"[default: {param.default}]" in shown, param.name


def test_some_help_texts_have_brackets() -> None:
    """Or the test above would see none."""
    texts = [getattr(param, "help", None) or "" for command in COMMANDS.values() for param in command.params]
    assert sum("[default: " in text for text in texts) > len(COMMANDS)


def test_only_one_module_makes_consoles() -> None:
    folder = Path(vidaccel.cli.__file__).parent
    makers = {path.name for path in folder.glob("*.py") if "rich.console import" in path.read_text()}
    assert makers == {"console.py"}
    assert all(type(command).__name__ == "PlainCommand" for command in COMMANDS.values())


def test_a_plan_with_markup_in_its_name(vidaccel: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "a [bold] folder"
    folder.mkdir()
    plan = replace(load_preset("sta"), name=MARKUP).with_provenance(author="[/] me :cat:")
    save_plan(plan, folder / "my [red] plan.safetensors")
    shown = vidaccel(
        "inspect", folder / "my [red] plan.safetensors", "-o", folder / "[x].png", "--grid", "4x8x8", env=WIDE
    ).stdout
    assert f"plan {MARKUP}" in shown and "[/] me :cat:" in shown and str(folder / "[x].png") in shown


def test_names_in_every_table() -> None:
    result = comparison((MARKUP, "[/] another"))
    result["plan"] = MARKUP
    for make in (report.comparison_table, report.seconds_table, report.demo_table):
        shown = _printed(make(result))
        assert make is report.seconds_table or MARKUP in shown, make


def test_names_in_the_tables_of_a_calibration() -> None:
    from vidaccel.cli.calibration_tables import cache_table, front_table
    from vidaccel.cli.linears import linear_table

    pair = {"cache": MARKUP, "chosen": True, "predicted": {"error": 0.1, "seconds": 1.0}, "measured": None}
    assert MARKUP in _printed(cache_table({"alone": [], "pairs": [pair], "left_out": {}}))
    figures = dict.fromkeys(("relative_error", "latent_error", "native_seconds", "seconds"), 0.1)
    row = {"kind": MARKUP, "precision": "int8", "chosen": 1, "count": 2, **figures}
    assert MARKUP in _printed(linear_table([row]))
    assert MARKUP in _printed(front_table([{"density": 1.0, "seconds": 2.0, "error": 0.0}], MARKUP))


def test_progress_says_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from vidaccel.cli.progress import Progress

    with Progress() as progress:
        progress.say(MARKUP)
    assert capsys.readouterr().err == f"{MARKUP}\n"


def test_doctor_names_what_to_install(vidaccel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidaccel.linear.support.why_not_table", lambda device: {"int8": "pip install 'vidaccel[x]'"})
    assert "pip install 'vidaccel[x]'" in vidaccel("doctor", env=WIDE).stdout


@pytest.mark.parametrize("command", ["generate", "compare", "demo", "check", "solve", "calibrate", "inspect"])
def test_refusals_name_paths_as_they_are(refused: Callable[..., str], command: str) -> None:
    first = {"generate": ("x", "--plan"), "compare": ("--prompt", "x", "--plan"), "demo": ("--plan",)}
    given = {"check": ("--prompt", "x"), "calibrate": ("--density", "1", "--prompt", "x", "--candidates")}
    path = "[/bold] :smile:.safetensors" if command != "calibrate" else "[/bold] :smile:"
    words = (command, *first.get(command, ()), path) if command in first else (command, *given.get(command, ()), path)
    assert path in refused(*words)


def _printed(table: Any) -> str:
    screen = console()
    screen.file, screen.width = io.StringIO(), 400
    screen.print(table)
    return screen.file.getvalue()
