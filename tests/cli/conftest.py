"""A tiny pipeline on disk, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny_wan import tiny_wan
from vidaccel.cli.main import app

#: Options for a run of well under a second that still has sparse layers: a 5x3x4 token grid.
SMALL = ("--height=48", "--width=64", "--num-frames=17", "--num-inference-steps=2", "--arg=max_sequence_length=16")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Wan pipeline with two layers."""
    path = tmp_path_factory.mktemp("model")
    tiny_wan(path)
    return path


@pytest.fixture
def small() -> tuple[str, ...]:
    """Options that keep a generation tiny."""
    return SMALL


@pytest.fixture
def vidaccel() -> Callable[..., Any]:
    """Runs ``vidaccel ARGUMENTS`` and checks its exit code."""

    def run(*arguments: object, code: int = 0, **options: Any) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
        told = f"{result.output}\n{result.exception!r}"
        assert result.exit_code == code, told
        if code == 2:
            assert "Traceback" not in result.output, told
        return result

    return run


@pytest.fixture
def refused(vidaccel: Callable[..., Any]) -> Callable[..., str]:
    """Runs a command that must end with one sentence on stderr and exit code 2; returns the sentence."""

    def run(*arguments: object, **options: Any) -> str:
        result = vidaccel(*arguments, code=2, **options)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        return lines[0].removeprefix("error: ")

    return run
