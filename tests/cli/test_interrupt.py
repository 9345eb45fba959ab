"""An interrupted command says what is on disk, and how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vidaccel.calibration.calibrate import Calibrator
from vidaccel.files import atomic_path, finished_files, write_json

EFFORT = ("--bins", 1, "--probes", 1, "--whole-probes", 0, "--tiles", 2, "--validate", 0)


def test_only_finished_files_count(tmp_path: Path) -> None:
    with finished_files() as outer:
        write_json(tmp_path / "a.json", 1)
        write_json(tmp_path / "a.json", 2)
        with finished_files() as inner, pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "b.json"):
            raise KeyboardInterrupt
    assert outer == [tmp_path / "a.json"] and inner == []


def test_clips_that_are_made_are_kept(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    from vidaccel.pipelines import generate as generation

    original, made = generation.generate, []

    def second_is_interrupted(*args: Any, **kwargs: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(generation, "generate", second_is_interrupted)
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a ball\na cat\na dog\n")
    words = ("generate", "-m", tiny_model, *small, "--prompts", prompts, "-o", folder)
    monkeypatch.setattr("sys.argv", ["vidaccel", *map(str, words)])
    told = vidaccel(*words, code=130).stderr
    assert (
        f"interrupted; 1 of 3 clips are in {folder}; the others are made by: vidaccel generate -m {tiny_model} " in told
    )
    assert len(list(folder.glob("*.mp4"))) == 1
    monkeypatch.setattr(generation, "generate", original)
    assert "2 made, 1 there before" in vidaccel(*words).stderr


def test_files_written_before_are_named(vidaccel: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    def written_then_interrupted(path: Path, *args: Any, **kwargs: Any) -> None:
        write_json(path, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr("vidaccel.report.draw_heatmap", written_then_interrupted)
    target = tmp_path / "map.png"
    told = vidaccel("inspect", "sta", "--grid", "4x8x8", "-o", target, code=130).stderr
    assert told == f"interrupted; {target} was written before that, whole\n"


def test_a_calibration_goes_on(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    candidates = tmp_path / "few.yaml"
    candidates.write_text(
        "name: few\nsummary: for tests\ntile: [2, 2, 2]\ncompensations: [none]\nprecisions: [native]\n"
        "patterns:\n  - {name: sliding_tile, window: [1, 1, 1]}\n"
    )
    monkeypatch.setattr("vidaccel.calibration.calibrate.cost_cache", lambda: tmp_path / "costs")
    words = ("calibrate", "-m", tiny_model, *small, "--candidates", candidates, *EFFORT, "--prompt", "a ball")
    words = (*words, "--density", 0.6, "-o", tmp_path / "plan.safetensors")
    kept = tmp_path / "plan.observations.safetensors"
    monkeypatch.setattr("sys.argv", ["vidaccel", *map(str, words)])

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "time", interrupted)
        assert "no output was written" in vidaccel(*words, code=130).stderr and not kept.exists()
    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "perturb", interrupted)
        told = vidaccel(*words, code=130).stderr
    assert (
        f"interrupted; what was observed is kept in {kept}; go on from there by: vidaccel calibrate -m {tiny_model} "
        in told
    )

    def observed(self: Calibrator) -> None:
        assert len(self.seen.done) == len(self.requests)  # from the file: there is nothing left to observe
        original(self)

    original = Calibrator.observe
    monkeypatch.setattr(Calibrator, "observe", observed)
    assert f"kept: {kept}" in vidaccel(*words).stdout


def test_a_real_interrupt(tiny_model: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("\n".join(f"a ball {number}" for number in range(200)))
    words = [sys.executable, "-m", "vidaccel", "generate", "-m", str(tiny_model), *small, "--prompts", str(prompts)]
    run = subprocess.Popen(
        [*words, "-o", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore interrupts, and so would their children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("[!.]*.json")) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGINT)
        _, told = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in told, told
    last = told.strip().splitlines()[-1]
    assert last.endswith(f"clips are in {folder}; the others are made by: vidaccel {' '.join(words[3:])} -o {folder}")
    count = int(last.removeprefix("interrupted; ").split()[0])
    assert count >= 1 and not list(folder.glob(".*"))
