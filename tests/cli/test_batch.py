"""``vidaccel generate --prompts``: many clips, resumed, shared among processes, and none lost to another's failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SMALL
from tests.cli.test_generate import frames_of
from vidaccel.errors import StrictError

pytestmark = pytest.mark.full

PROMPTS = ["a red ball", "a blue cat, surfing!", "a green dog"]
NAMES = ["001-a-red-ball", "002-a-blue-cat-surfing", "003-a-green-dog"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n# a remark\n" + "\n".join(PROMPTS) + "\n")
    return path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_one_clip_for_each_prompt_and_nothing_twice(
    vidaccel: Callable[..., Any], tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "clips"
    command = ("generate", "--prompts", prompts, "-m", tiny_model, "--plan", "dense", "--seed", 7, *SMALL, "-o", out)
    found = lines(vidaccel(*command).stdout)
    assert [(line["number"], line["prompt"], line["seed"], line["state"]) for line in found] == [
        (number, prompt, 6 + number, "made") for number, prompt in enumerate(PROMPTS, 1)
    ]
    assert sorted(path.stem for path in out.glob("*.mp4")) == NAMES
    assert lines((out / "clips.jsonl").read_text()) == found
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("0*")}

    # one clip lost its record, as when a run is killed between video and record
    (out / f"{NAMES[1]}.json").unlink()
    again = lines(vidaccel(*command).stdout)
    assert [line["state"] for line in again] == ["found", "made", "found"]
    for path, (when, content) in before.items():
        assert (path.stat().st_mtime_ns == when) == (path.stem != NAMES[1])
        assert path.suffix != ".mp4" or path.read_bytes() == content  # the same seed makes the same video

    alone = tmp_path / "alone.mp4"
    vidaccel("generate", PROMPTS[2], "-m", tiny_model, "--plan", "dense", "--seed", 9, *SMALL, "-o", alone)
    assert alone.read_bytes() == (out / f"{NAMES[2]}.mp4").read_bytes()


def test_clips_of_other_settings_are_not_taken_for_these(
    vidaccel: Callable[..., Any], refused: Callable[..., str], tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "clips"
    command = ("generate", "--prompts", prompts, "-m", tiny_model, *SMALL, "-o", out)
    vidaccel(*command, "--plan", "dense")
    kept = (out / f"{NAMES[0]}.json").read_bytes()
    for change in (("--plan", "sta"), ("--plan", "dense", "--seed", 1), ("--plan", "dense", "--fps", 9)):
        assert "made with another model, plan or settings; choose another folder" in refused(*command, *change)
    assert (out / f"{NAMES[0]}.json").read_bytes() == kept
    (out / f"{NAMES[0]}.json").write_text("something else")
    assert "made with another model" in refused(*command, "--plan", "dense")


def test_a_failing_prompt_does_not_lose_the_others(
    vidaccel: Callable[..., Any],
    tiny_model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vidaccel.pipelines import generate

    original = generate.generate
    broken = {"a blue cat, surfing!"}

    def sometimes(pipe: Any, request: Any, **options: Any) -> Any:
        if request.prompt in broken:
            raise MemoryError("out of\nmemory")
        return original(pipe, request, **options)

    monkeypatch.setattr(generate, "generate", sometimes)
    out = tmp_path / "clips"
    command = ("generate", "--prompts", prompts, "-m", tiny_model, "--plan", "dense", *SMALL, "-o", out)
    result = vidaccel(*command, code=2)
    made = lines(result.stdout)
    assert [line["state"] for line in made] == ["made", "failed", "made"]
    assert made[1]["error"] == "MemoryError: out of" and made[1]["at"].startswith("test_batch.py:")
    assert "error: 1 of 3 clips failed" in result.stderr and "run the same command again" in result.stderr
    assert not list(out.glob("002*")) and not list(out.glob(".*"))
    broken.clear()
    assert [line["state"] for line in lines(vidaccel(*command).stdout)] == ["found", "made", "found"]


def test_a_plan_that_cannot_run_as_demanded_ends_the_run_at_once(
    refused: Callable[..., str], tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(pipe: Any, request: Any, **options: Any) -> Any:
        raise StrictError("transformer layer 0 cannot run as the plan says")

    monkeypatch.setattr("vidaccel.pipelines.generate.generate", cannot)
    said = refused("generate", "--prompts", prompts, "-m", tiny_model, "--strict", *SMALL, "-o", tmp_path / "clips")
    assert "cannot run as the plan says" in said
    assert (tmp_path / "clips" / "clips.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("a prompt",), "there is a prompt beside --prompts FILE"),
        (("-o", "clips.mp4"), "many prompts make many files; name a folder"),
        (("--prompts", "missing.txt"), "the prompts in missing.txt cannot be read"),
    ],
)
def test_bad_options(
    refused: Callable[..., str], tiny_model: Path, prompts: Path, change: tuple[str, ...], says: str
) -> None:
    assert says in refused("generate", "--prompts", prompts, "-m", tiny_model, *change)


def start(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    """``vidaccel ARGUMENTS`` in processes of its own."""
    # what accelerate launch runs for GPUs; on a CPU it starts one process only
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "vidaccel"]
    command = [sys.executable, *(launch if processes > 1 else ["-m", "vidaccel"]), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.timeout(300)
def test_processes_share_the_prompts_and_a_killed_run_goes_on(
    vidaccel: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("\n".join(f"clip number {n}" for n in range(6)))
    arguments = ("generate", "--prompts", prompts, "-m", tiny_model, "--plan", "dense", *SMALL, "-o", out)
    running = start(*arguments)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.json")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.02)
    assert running.poll() is None, running.communicate()
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    first = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 1 <= len(first) <= 6

    # one clip cannot be written; its process ends with an error, and the launcher then ends whatever still runs
    record, video = out / "001-clip-number-0.json", out / "001-clip-number-0.mp4"
    first.pop(record, None)
    record.unlink(missing_ok=True)
    video.unlink(missing_ok=True)
    video.mkdir()
    both = start(*arguments, processes=2)
    stdout, stderr = both.communicate(timeout=240)
    assert both.returncode != 0 and "error: 1 of 3 clips failed" in stderr, stderr
    assert sorted(line["number"] for line in lines(stdout)) == [1, 2, 3, 4, 5, 6]
    logs = [lines((out / f"clips.{rank}.jsonl").read_text()) for rank in (0, 1)]
    assert [[line["number"] for line in log] for log in logs] == [[1, 3, 5], [2, 4, 6]]
    states = {line["number"]: line["state"] for log in logs for line in log}
    assert states.pop(1) == "failed" and set(states.values()) <= {"made", "found"}
    assert sum(state == "found" for state in states.values()) == len(first)
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())

    video.rmdir()
    last = lines(vidaccel(*arguments).stdout)
    assert [line["state"] for line in last] == ["made", *["found"] * 5]
    videos = sorted(out.glob("*.mp4"))
    assert len(videos) == 6 and all(frames_of(video).shape == (17, 48, 64, 3) for video in videos)


@pytest.fixture
def one_of_eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """This process as the second of four on the second of two machines, as launchers tell it: by the environment.

    Yields what the process group was asked to be; the group itself is torch's imitation.
    """
    from accelerate import PartialState
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    asked: dict[str, Any] = {}
    real = distributed.init_process_group

    def imitate(**given: Any) -> None:
        asked.update(given)
        real("fake", rank=given["rank"], world_size=given["world_size"], store=FakeStore())

    told = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": 1, "OMP_NUM_THREADS": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(distributed, "init_process_group", imitate)
    PartialState._reset_state()
    yield asked
    if distributed.is_initialized():
        distributed.destroy_process_group()
    PartialState._reset_state()


def test_ranks_count_over_all_machines(one_of_eight: dict[str, Any]) -> None:
    from vidaccel.cli.batch import Team
    from vidaccel.pipelines.batch import Share

    team = Team("cpu")
    assert (one_of_eight["rank"], one_of_eight["world_size"]) == (5, 8)
    assert team.share == Share(5, 8)
    team.close()


def test_a_process_waits_for_all_others(one_of_eight: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    from vidaccel.cli import batch

    store, looks = distributed.HashStore(), []

    def sleep(seconds: float) -> None:
        looks.append(store.add(batch._THROUGH, 1))  # meanwhile another one comes to its end

    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(batch.time, "sleep", sleep)
    team = batch.Team("cpu")
    team.wait()
    assert looks == [2, 3, 4, 5, 6, 7, 8]
    team.close()


def test_names_and_shares() -> None:
    from vidaccel.pipelines.batch import Share, clips_of
    from vidaccel.pipelines.generate import Request

    requests = [Request(text) for text in ("Ünïcode ../../etc", "..", "x" * 200, "x" * 200)]
    clips = clips_of(requests, Path("out"), {"plan": 1})
    assert [clip.video.name for clip in clips] == [
        "001-n-code-etc.mp4", "002.mp4", f"003-{'x' * 48}.mp4", f"004-{'x' * 48}.mp4",
    ]  # fmt: skip
    assert all(clip.video.parent == Path("out") for clip in clips)
    assert [clip.number for rank in range(3) for clip in Share(rank, 3).of(clips)] == [1, 4, 2, 3]
    other = clips_of(requests, Path("out"), {"plan": 2})
    assert clips[0].fingerprint != other[0].fingerprint and clips[2].fingerprint == clips[3].fingerprint
