"""Plan and state files of strangers: 1,000 mutations of each, in a process that watches itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.reliability.artifacts import KINDS, MEGABYTES
from tests.reliability.mutations import mutations
from vidaccel.configs import artifact
from vidaccel.configs.artifact import load_plan, save_plan
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.sealed import Sealed
from vidaccel.errors import ConfigError, PlanFileError
from vidaccel.types import VideoGrid

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_mutations(kind: str) -> None:
    """In a process of its own: an audit hook cannot be taken back, and its memory is nobody else's."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.artifacts", "--kind", kind, "--cases", "1000", "--seed", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert not found["complaints"], "\n".join(found["complaints"])
    assert found["cases"] == 1000 and min(found["same"], found["other"], found["refuse"]) > 100


def test_mutations_come_back_by_their_seed(tmp_path: Path) -> None:
    kind = KINDS["plan"]
    kind.save(kind.make(), tmp_path / "p.safetensors")
    first, again, other = (list(mutations(kind.file, tmp_path / "p.safetensors", 50, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    """The control: a loader that runs code, takes too much or accepts damage is found out."""
    code = f"""
from pathlib import Path
from dataclasses import replace
from tests.reliability import artifacts
kind = artifacts.KINDS["plan"]
calls = iter(range(10**6))
kept = []

def bad(path):
    call = next(calls)  # 41 before the cases, then one to three a case
    if 60 <= call < 63:
        eval("1 + 1")
    if 66 <= call < 69:
        kept.append(b"x" * ({MEGABYTES + 1} << 20))
    if 72 <= call < 75:
        open("/dev/null").close()
    if 78 <= call < 81:
        raise KeyError("traceback")
    return kind.make()

kind = replace(kind, load=bad)
for line in artifacts.run(kind, 40, 0, Path({str(tmp_path)!r}))["complaints"]:
    print(line)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    wanted = ("it was accepted", "was ignored", "compile", "/dev/null", "KeyError", "it took", "the process grew by")
    for says in wanted:
        assert says in done.stdout, done.stdout + done.stderr


def most_greedy(kind: str) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """The parts of a plan file of the largest size allowed that take the most memory for their bytes."""
    head = {"pattern": "p"}
    meta: dict[str, object] = {"name": "p", "tile": None, "fingerprint": None, "provenance": {}, "palette": [head]}
    many = {"rules": 55_000, "palette": 30_000, "layers": 1, "heads": 1}[kind]
    if kind == "palette":
        meta["palette"] = [{"pattern": f"p{number}"} for number in range(many)]
    heads = {"rules": many, "palette": many, "layers": 1, "heads": 500_000}[kind]
    layers = 500_000 if kind == "layers" else 0
    rules = many if kind == "rules" else 1
    zeros = np.zeros(heads, np.int32)
    return meta, {
        "noise": np.tile([[0.25, 0.75]], (rules, 1)),
        "transformer": np.full(rules, -1, np.int32),
        "branch": np.full(rules, -1, np.int32),
        "layers": np.arange(layers, dtype=np.int32) % 65_536,
        "layers_offsets": np.int32([0, layers]) if rules == 1 else np.zeros(rules + 1, np.int32),
        "heads": np.arange(heads, dtype=np.int32) if kind == "palette" else zeros,
        "heads_offsets": np.int32([0, heads]) if rules == 1 else np.arange(rules + 1, dtype=np.int32),
    }


@pytest.mark.parametrize("kind", ["rules", "palette", "layers", "heads"])
def test_the_largest_plan_file_takes_little_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    artifact._FILE.write(path, *most_greedy(kind))
    assert path.stat().st_size > artifact._FILE.max_bytes // 3
    tracemalloc.start()
    try:
        load_plan(path)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """Opening a named pipe waits for a writer who may never come."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for path, says in (
        (tmp_path / "pipe.safetensors", "a device, a pipe or a socket"),
        (Path("/dev/zero"), "a device, a pipe or a socket"),
        (tmp_path / "loop.safetensors", "cannot be read"),
        (tmp_path, "cannot be read"),
        (Path(f"{tmp_path}/a\0b.safetensors"), "is not a usable plan"),
    ):
        with pytest.raises(PlanFileError, match=says):
            load_plan(path)


def test_names_are_only_names(tmp_path: Path) -> None:
    """A plan called like a path is read and written as it is; nothing appears elsewhere."""
    for number, name in enumerate(("../../escape", "/tmp/escape", "a\\..\\b", "CON", "~", "$(id)", "a\nb")):
        plan = KINDS["plan"].make()
        object.__setattr__(plan, "name", name)
        save_plan(plan, tmp_path / "plan.safetensors")
        assert load_plan(tmp_path / "plan.safetensors") == plan, number
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]


def test_half_a_character_is_neither_written_nor_read(tmp_path: Path) -> None:
    sealed = Sealed("plan", 1, "a test", {}, 1 << 20)
    with pytest.raises(ConfigError, match="half a character"):
        sealed.write(tmp_path / "x.safetensors", {"name": "\ud800"}, {})
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_cannot_ask_for_a_billion_of_anything() -> None:
    with pytest.raises(ConfigError, match="at most 16777216 tokens"):
        Fingerprint(grid=VideoGrid(1000, 1000, 1000))
    for field in ("heads", "layers"):
        with pytest.raises(ConfigError, match="from 1 to 65535"):
            Fingerprint(**{field: 10**9})
