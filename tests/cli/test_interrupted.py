"""An interrupted command says what is on disk, and the command that goes on with it."""

from __future__ import annotations

import importlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
COLORS = ("a red ball", "a blue cat", "a green circle", "a black dog")
FEW = """
name: few
summary: for tests
tile: [2, 2, 2]
compensations: [none]
precisions: [native]
patterns:
  - {name: sliding_tile, window: [1, 1, 1]}
"""


@pytest.fixture
def calibration(tiny_model: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a calibration on two prompts, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "few.yaml").write_text(FEW)
    effort = ("--bins", "1", "--probes", "1", "--whole-probes", "1", "--tiles", "2", "--validate", "0")
    prompts = [f"--prompt={text}" for text in COLORS[:2]]
    return [
        "calibrate",
        "-m",
        str(tiny_model),
        *small,
        "--candidates",
        "few.yaml",
        "--density",
        "0.8",
        *effort,
        *prompts,
    ]


@pytest.fixture
def batch(tiny_model: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a run of four prompts, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(COLORS))
    return ["generate", "-m", str(tiny_model), *small, "--prompts", "prompts.txt", "-o", "clips"]


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, where: str, calls: int) -> None:
    """The call after so many of them is met by a user's interrupt."""
    module, _, name = where.rpartition(".")
    original = getattr(importlib.import_module(module), name)
    count = iter(range(calls))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(where, interrupted)


def _goes_on(told: str) -> list[str]:
    """The words of the command that goes on; the program is this process."""
    (line,) = [line for line in told.splitlines() if line.startswith("go on with: ")]
    words = shlex.split(line.removeprefix("go on with: "))
    assert words[0] == "vidaccel"
    return words[1:]


def test_clips(vidaccel: Run, batch: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/vidaccel", *batch])
    with monkeypatch.context() as patched:
        _interrupt_after(patched, "vidaccel.pipelines.video.write_video", 2)
        told = vidaccel(*batch, code=130).stderr
    assert "interrupted; kept: 2 finished of 4 clips in clips\n" in told
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 2 and not list(tmp_path.rglob("*.partial*"))
    again = vidaccel(*_goes_on(told))
    assert "2 made, 2 there before, 0 failed" in again.stderr


def test_nothing_of_the_first_clip_is_nothing(vidaccel: Run, batch: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_after(monkeypatch, "vidaccel.pipelines.video.write_video", 0)
    told = vidaccel(*batch, code=130).stderr
    assert told.splitlines()[-1] == "interrupted; no output was written"


def test_observations(vidaccel: Run, calibration: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vidaccel.calibration.calibrate import Calibrator

    def stop(run: Calibrator) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["vidaccel", *calibration])
    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "perturb", stop)
        told = vidaccel(*calibration, code=130).stderr
    assert "interrupted; kept: the observations in plan.observations.safetensors\n" in told
    assert not (tmp_path / "plan.safetensors").exists()
    with monkeypatch.context() as patched:
        watched: list[object] = []
        patched.setattr("vidaccel.calibration.calibrate.CandidateWatcher", lambda *a, **k: watched.append(a))
        vidaccel(*_goes_on(told))
    assert not watched and (tmp_path / "plan.safetensors").exists()


def test_a_plan_that_is_written_is_named(
    vidaccel: Run, calibration: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(monkeypatch, "vidaccel.calibration.summary.calibration_result", 0)
    told = vidaccel(*calibration, code=130).stderr
    assert "interrupted; written: plan.safetensors; kept: the observations in plan.observations.safetensors\n" in told


def test_a_file_that_was_there_before_is_not_written(
    vidaccel: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("map.png").write_bytes(b"of yesterday")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vidaccel.report.draw_heatmap", stop)
    told = vidaccel("inspect", "sta", "--grid", "4x4x4", "-o", "map.png", code=130).stderr
    assert told == "interrupted; no output was written\n"


@pytest.mark.full
@pytest.mark.parametrize("what", ["batch", "calibration"])
def test_a_real_signal(what: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Sent once the first result is on disk; the command that is then named ends the work."""
    words: list[str] = request.getfixturevalue(what)
    program = [sys.executable, "-m", "vidaccel"]
    if what == "batch":  # so many that the rest is not made before the signal comes
        (tmp_path / "prompts.txt").write_text("\n".join(f"{color} {n}" for n in range(25) for color in COLORS))
    else:
        words = [*words, *(f"--prompt={color} {n}" for n in range(25) for color in COLORS)]
    kept = "clips/*.json" if what == "batch" else "plan.observations.safetensors"
    running = subprocess.Popen([*program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob(kept)) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert "interrupted; kept: " in told and "Traceback" not in told
    words = _goes_on(told)
    if what == "batch":
        done = len(list(tmp_path.glob("clips/*.json")))
        assert f"{done} finished of 100 clips" in told
        (tmp_path / "prompts.txt").write_text("\n".join(f"{color} 0" for color in COLORS[:1]))
        ended = subprocess.run([*program, *words], capture_output=True, text=True, check=True, timeout=120)
        assert "0 made, 1 there before, 0 failed" in ended.stderr
    else:
        words = [word for word in words if word.split()[-1] in ("ball", "cat") or "--prompt" not in word]
        ended = subprocess.run([*program, *words], capture_output=True, text=True, check=True, timeout=120)
        assert (tmp_path / "plan.safetensors").exists() and "written: plan.safetensors" in ended.stdout
