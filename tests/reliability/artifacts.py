"""Feeds mutated files to the loaders in a process that is watched: ``python -m tests.reliability.artifacts``.

Watched are results, exceptions, memory (Python's and NumPy's allocations of each case, and the process as a whole),
endless loops, and what a file could make Python do: code run or compiled, processes started, other files opened.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reliability.mutations import Mutation, mutations
from vidaccel.calibration import observations as observed
from vidaccel.calibration.cache_runs import CacheRun
from vidaccel.calibration.cells import FIELDS, Place, Sample
from vidaccel.calibration.linear_table import LinearTable, cost_key
from vidaccel.calibration.observations import Observations
from vidaccel.calibration.shape import Shape
from vidaccel.configs import artifact
from vidaccel.configs.fingerprint import Fingerprint
from vidaccel.configs.linear import LinearPlan, LinearRule
from vidaccel.configs.pattern_spec import CompensationSpec, PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.configs.sealed import Sealed
from vidaccel.errors import ConfigError, PlanFileError
from vidaccel.linear.measure import LinearErrors
from vidaccel.types import TileShape, VideoGrid

MEGABYTES = 100
#: A case that takes longer is an endless loop, on any machine.
SECONDS = 60
#: Audit events that a file must never cause.
FORBIDDEN = (
    "exec", "compile", "import", "marshal.loads", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec",
    "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "socket.", "ctypes.", "shutil.", "urllib.",
    "code.__new__",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file: how it is sealed, written and read, and its content in a comparable form."""

    file: Sealed
    make: Callable[[], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]
    content: Callable[[Any], Any]


def plan() -> Plan:
    """A plan that uses every field of a plan file."""
    window = PatternSpec.make("union", patterns=(PatternSpec.make("sliding_tile", window=(1, 1.0, 0.5)), "radial"))
    policies = (
        HeadPolicy(window, "int8", CompensationSpec.make("rettention", period=4, growth=0.5)),
        HeadPolicy(PatternSpec.make("pooled_top_k", density=0.25), compensation="pooled_tail", skip=2.5),
        HeadPolicy(),
    )
    return Plan(
        "example",
        (
            Rule(LayerPolicy(), noise=(0.943, 1.0)),
            Rule(LayerPolicy(policies), layers=(0, 2, 5), branch="uncond"),
            Rule(LayerPolicy(policies[1:2]), noise=(0.1, 0.9), transformer="transformer_2"),
        ),
        tile=TileShape(4, 4, 5),
        fingerprint=Fingerprint.make(
            {"patch_size": [1, 2, 2], "rope": "3d", "eps": 1e-6}, model_class="Wan", heads=3, layers=6,
            grid=VideoGrid(16, 12, 12), scheduler="Euler", vidaccel="0.1.0",
        ),
        provenance=(("command", "vidaccel calibrate"), ("device", "cpu")), cache="first-block:0.08",
        linear=LinearPlan((LinearRule("int8", ("blocks.*.ffn.net.2",), (0, 3), "transformer"), LinearRule("fp8"))),
    )  # fmt: skip


def linears() -> LinearTable:
    """A table of Linears that uses every field."""
    item = LinearErrors(
        "transformer", "blocks.*.ffn.net.2", 3, "ffn", (32, 48), True, torch.bfloat16, 2, 1, 7.5, 8, [1.5, 2.5],
        {"fp8": [0.5, 0.25], "int8": [0.125, 0.75]},
    )  # fmt: skip
    changes = {"fp8": {"ffn": 0.5}, "int8": {"ffn": 0.25}}
    seconds = {cost_key(item): {"fp8": 0.5, "int8": 0.25, "native": 1.5}}
    return LinearTable(("int8", "fp8"), [item], 2, changes, seconds)


def observations() -> Observations:
    """Observations that use every field of their file."""
    draw = np.random.default_rng(0)
    seen = Observations(
        candidates=(HeadPolicy(), plan().rules[1].policy.heads[1]),
        tile=TileShape(2, 2, 2),
        fingerprint=Fingerprint(model_class="Model", heads=2, layers=2, grid=VideoGrid(4, 4, 4)),
        edges=(0.0, 0.5, 1.0),
        steps=(2, 3),
        settings={"arguments": {"height": 32, "guidance_scale": 3.5}, "weights": "abc"},
        times={"total": 2.0, "attention": 1.0},
        probes=[{"layer": 0, "error": 0.5}],
        costs={"device": "cpu", "dense": 0.25},
        notes=["a note"],
        provenance={"device": "a device"},
        shape=Shape(1, 2, 16, "float32", 3, True),
        caches=[CacheRun("pab:2", "key0", 0.25, 0.75, 0.5, None)],
        linears=linears(),
    )
    places = [
        Place(b, t, 0, branch) for b in (0, 1) for t in ("transformer", "transformer_2") for branch in ("cond", "")
    ]
    for number in range(2):
        figures = {p: [draw.random((2, 2)).astype(np.float32) for _ in range(4)] for p in places}
        seen.add(f"key{number}", {p: Sample(*f, draw.random(2).astype(np.float32)) for p, f in figures.items()})
    for place in seen.places():
        seen.weight[place] = 0.5 + place[0]
    return seen


def _of_observations(seen: Observations) -> Any:
    """Everything in it; mappings sorted, because a file sorts them."""
    told = {name: _sorted(value) for name, value in vars(seen).items() if name != "cells"}
    for place, cell in seen.cells.items():
        told[repr(place)] = [cell.prompts, *(getattr(cell, f).tobytes() for f in (*FIELDS, "energy"))]
    return repr(_sorted(told))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((repr(key), _sorted(item)) for key, item in value.items())
    return [_sorted(item) for item in value] if isinstance(value, list) else repr(value)


KINDS = {
    "plan": Kind(artifact._FILE, plan, artifact.save_plan, artifact.load_plan, repr),
    "observations": Kind(observed._FILE, observations, Observations.save, Observations.load, _of_observations),
}


class Endless(Exception):
    """A case did not end."""


class Watch:
    """Collects what Python is asked to do while a case runs."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGALRM, self._ring)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.path is None:
            return
        if event.startswith(FORBIDDEN) or (event == "open" and str(args[0]) != self.path):
            self.seen.append(f"{event} {str(args[:1])[:80]}")

    def _ring(self, *_: Any) -> None:
        raise Endless


def judge(kind: Kind, mutation: Mutation, path: Path, original: Any) -> str | None:
    """What is wrong with how a file was taken, or ``None``. The file is at ``path``."""
    try:
        found = kind.load(path)
    except PlanFileError as error:
        text = str(error)
        bad = "\n" in text or len(text) > 1000 or not text.startswith(str(path))
        return f"the message is not one sentence about the file: {text[:300]!r}" if bad else None
    except ConfigError as error:
        return f"a ConfigError that does not name the file: {error}"
    if mutation.owed == "refuse":
        return "it was accepted"
    content = kind.content(found)
    if mutation.owed == "same":
        return None if content == original else "it was accepted with other content"
    if mutation.counts and content == original:
        return "what was changed was ignored"
    return None


def written_again(kind: Kind, path: Path) -> str | None:
    """What is lost when an accepted file's content is written and read again, or ``None``."""
    try:
        first = kind.load(path)
    except ConfigError:
        return None
    kind.save(first, path)
    return None if kind.content(kind.load(path)) == kind.content(first) else "written again it is another"


def run(kind: Kind, count: int, seed: int, folder: Path, only: int | None = None) -> dict[str, Any]:
    """Judges ``count`` mutations; returns counts, the largest figures and every complaint."""
    good, path = folder / "good.safetensors", folder / "file.safetensors"
    kind.save(kind.make(), good)
    original = kind.content(kind.load(good))
    assert original == kind.content(kind.make()), "the good file is not what was written"
    watch = Watch()
    for mutation in mutations(kind.file, good, 40, seed + 1):  # so that lazy imports of the error paths are done
        path.write_bytes(mutation.raw)
        try:
            kind.load(path)
        except Exception:  # noqa: BLE001 - judged below
            continue
    complaints, counts, peak, slowest = [], collections.Counter[str](), 0, 0.0
    resident = _most_resident()
    tracemalloc.start()
    for number, mutation in enumerate(mutations(kind.file, good, count, seed)):
        if only is not None and number != only:
            continue
        path.write_bytes(mutation.raw)
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
        signal.alarm(SECONDS)
        watch.path = str(path)
        try:
            wrong = judge(kind, mutation, path, original)
        except Endless:
            wrong = f"it did not end within {SECONDS} s"
        except Exception as error:  # noqa: BLE001 - any other exception is the finding
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        watch.path = None
        slowest = max(slowest, time.perf_counter() - began)
        used = tracemalloc.get_traced_memory()[1] - before
        peak = max(peak, used)
        try:
            if wrong is None and mutation.owed == "other":
                wrong = written_again(kind, path)
        except Exception as error:  # noqa: BLE001 - any exception is the finding
            wrong = f"accepted, but cannot be written again: {type(error).__name__}: {str(error)[:200]}"
        signal.alarm(0)
        if used > MEGABYTES << 20:
            wrong = f"it took {used >> 20} MB"
        if watch.seen:
            wrong = f"it made Python do this: {watch.seen}"
            watch.seen = []
        counts[mutation.owed] += 1
        if wrong is not None:
            complaints.append(f"case {number} of seed {seed}: {mutation.name}: {wrong}")
    tracemalloc.stop()
    grown = (_most_resident() - resident) / 1024
    if grown > MEGABYTES:
        complaints.append(f"the process grew by {grown:.0f} MB")
    return {
        "cases": sum(counts.values()),
        **counts,
        "largest_mb": round(peak / 2**20, 2),
        "process_grew_mb": round(grown, 1),
        "slowest_seconds": round(slowest, 3),
        "complaints": complaints,
    }


def _most_resident() -> int:
    """Most memory that this process has held, in KiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at that of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Prints one JSON object; exits with 1 if there is a complaint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(KINDS), default="plan")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one case to run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(KINDS[given.kind], given.cases, given.seed, Path(folder), given.only)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["complaints"]))


if __name__ == "__main__":
    main()
