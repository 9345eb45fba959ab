"""Runs the tests under each setting of a CPU's arithmetic: ``python -m tests.settings`` (``make test-settings``).

Vector units, libraries and numbers of threads sum in another order, so results differ in their last places. The tests
hold under all of them. What this CPU has not is listed as not run. ``--write`` puts the result into a page of the docs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
_COUNTED = re.compile(r"(\d+) (passed|failed|errors?)\b")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.M)
_CHOSEN = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "VIDACCEL_TEST_THREADS",
    "VIDACCEL_TEST_ONEDNN", "OMP_WAIT_POLICY",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One of them.

    Args:
        name: for the table.
        environment: what chooses it.
        needs: flag of ``/proc/cpuinfo`` without which it would run as something else.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


#: More threads than cores that wait for each other by spinning take three times as long.
_PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
# Kinds of CPU, each with a number of threads: so every value is in effect in some run, in a third of the time.
# torch's bfloat16 attention asks oneDNN whether there is AMX, and fails if there is and ATen has no AVX-512; no CPU is
# like that.
SETTINGS = (
    Setting("as it is"),
    Setting("no vector units", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
    Setting(
        "AVX2",
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "VIDACCEL_TEST_THREADS": "2",
            **_PATIENT,
        },
        "avx2",
    ),
    Setting(
        "AVX-512 without AMX",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "VIDACCEL_TEST_THREADS": "4", **_PATIENT},
        "avx512bw",
    ),
    Setting("oneDNN off", {"VIDACCEL_TEST_ONEDNN": "0"}),
)


@dataclass(frozen=True)
class Result:
    """What the tests gave under a setting; ``code`` is ``None`` if they did not run."""

    setting: Setting
    code: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def chosen(self) -> str:
        """The environment that chose it."""
        return " ".join(f"`{name}={value}`" for name, value in self.setting.environment.items())

    @property
    def row(self) -> str:
        """A line of the table."""
        if self.code is None:
            return f"| {self.setting.name} | {self.chosen} | not run: this CPU has no {self.setting.needs} | | | | |"
        names = ", ".join(f"`{name}`" for name in self.failed)
        failed = sum(count for kind, count in self.counts.items() if kind != "passed")
        return (
            f"| {self.setting.name} | {self.chosen} | {self.counts.get('passed', 0)} |"
            f" {failed}{' ' * bool(names)}{names} | {self.seconds:.0f} | {self.code} | {commit()} |"
        )


def run(setting: Setting, flags: set[str], pytest: Sequence[str]) -> Result:
    """Runs the tests under a setting, whose last lines it prints if something failed."""
    if setting.needs is not None and setting.needs not in flags:
        return Result(setting)
    environment = {name: value for name, value in os.environ.items() if name not in _CHOSEN} | setting.environment
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(*done.stdout.splitlines()[-40:], *done.stderr.splitlines()[-10:], sep="\n", flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {kind: int(count) for count, kind in _COUNTED.findall(last)}
    names = tuple(dict.fromkeys(_FAILED.findall(done.stdout)))
    return Result(setting, done.returncode, counts, names, time.monotonic() - began)


def cpu() -> tuple[str, set[str]]:
    """Model and flags of this machine's CPU."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in lines.items()}
    return values.get("model name", platform.processor()), set(values.get("flags", "").split())


def commit() -> str:
    """What is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def page(results: Sequence[Result], marks: str) -> str:
    """The docs' page of a run."""
    model, flags = cpu()
    units = ", ".join(unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if unit in flags)
    return "\n".join([
        "# The tests under other arithmetic",
        "",
        "Vector units, libraries and numbers of threads sum in another order, so results differ in their last places.",
        "`make test-settings` runs the tests under each setting; its last run:",
        "",
        f"{datetime.date.today().isoformat()}, {model} ({units}), torch {torch.__version__}, Python"
        f" {platform.python_version()}, `pytest -m {marks!r}`.",
        "",
        "| Setting | | Passed | Failed | Seconds | Exit code | Commit |",
        "|---|---|---|---|---|---|---|",
        *(result.row for result in results),
        "",
        "What is not named is as it is: one thread in each process, and what the CPU offers. The tests of the guard",
        "also run with stand-ins for attention that give NaN and that give zeros for NaN queries, under every setting.",
        "inductor makes no code without vector units, so its test is left out there.",
        "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marks", default="not slow", help="marks of the tests to run [%(default)s]")
    parser.add_argument("--jobs", default="2", help="processes at once [%(default)s]")
    parser.add_argument("--only", nargs="*", help="names of settings")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("paths", nargs="*", help="tests; all without")
    given = parser.parse_args()
    unknown = set(given.only or ()) - {setting.name for setting in SETTINGS}
    if unknown:
        parser.error(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in SETTINGS)}")
    if given.write is not None and (given.only is not None or given.paths):
        parser.error("a page is of all settings and all tests; leave out --write, or --only and the paths")
    flags = cpu()[1]
    results = []
    for setting in SETTINGS:
        if given.only is None or setting.name in given.only:
            results.append(run(setting, flags, ["-n", given.jobs, "-m", given.marks, *given.paths]))
            print(results[-1].row, flush=True)
    if given.write is not None:
        given.write.write_text(page(results, given.marks), encoding="utf-8")
    return 1 if any(result.code for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
