"""The command as a whole: quick help, both spellings of flags, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from vidaccel.version import __version__

COMMANDS = ("generate", "compare", "inspect", "models", "doctor", "demo")


def test_help_names_every_command_and_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from vidaccel.cli.main import app;"
        "result = CliRunner().invoke(app, ['--help']); print(result.output);"
        "helps = [CliRunner().invoke(app, [name, '--help']).exit_code for name in sys.argv[1:]];"
        "heavy = {'torch', 'diffusers', 'numpy', 'cv2', 'matplotlib'} & set(sys.modules); print(helps, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=True)
    assert all(f" {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == f"{[0] * len(COMMANDS)} set()"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vidaccel.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"vidaccel {__version__}\n"


def test_what_the_command_line_does_not_know_is_refused(refused: Callable[..., str]) -> None:
    told = refused("generate", "a cat", "--num-farmes", 3)
    assert told.startswith("No such option: --num-farmes") and told.endswith("; see vidaccel generate --help")
    assert "No such command 'generat'" in refused("generat")
    assert "--num-frames" in refused("generate", "a cat", "--num-frames", "many")


def test_the_default_plan_is_that_of_patch() -> None:
    from vidaccel.cli.options import DEFAULT_PLAN
    from vidaccel.pipelines.patch import DEFAULT_PLAN as OF_PATCH

    assert DEFAULT_PLAN == OF_PATCH


@pytest.mark.parametrize("flag", ["--num-inference-steps", "--num_inference_steps"])
def test_hyphen_and_underscore_are_one(refused: Callable[..., str], flag: str) -> None:
    """A value below the minimum proves that the flag was understood."""
    assert "for '--num-inference-steps'" in refused("generate", "a cat", flag, 0)


def test_an_interrupt_ends_with_130(vidaccel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vidaccel.cli.options.read_plan", interrupted)
    result = vidaccel("inspect", "sta", code=130)
    assert "interrupted" in result.stderr


def test_a_bug_keeps_its_traceback(vidaccel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("vidaccel.cli.options.read_plan", broken)
    result = vidaccel("inspect", "sta", code=1)
    assert isinstance(result.exception, RuntimeError)


def test_too_little_memory_is_no_bug(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr("vidaccel.cli.options.read_plan", full)
    assert "too little memory; try --cpu-offload" in refused("inspect", "sta")
