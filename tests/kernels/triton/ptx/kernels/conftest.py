"""Every test here runs on compiled kernels: their PTX is executed on the CPU, and must be without faults.

A module says with ``ARCHES`` for which architectures its tests are compiled, each test for each of them, with
``REPRESENTATIVE`` which of those the marks ``representative`` of its tests count for, and with ``ONLY_FULL`` in whose
names they do not, because those take long. Most tests are those of the interpreter, imported: one table of cases serves
both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.triton.proofs import REACHED
from tests.kernels.triton.ptx.emulator import Emulator, emulating
from tests.kernels.triton.ptx.kernels.executions import Executions, without_assembler
from tests.kernels.triton.rounding import oracle_rounds_as
from vidaccel.kernels.triton import configs, launch
from vidaccel.types import Precision

HERE = Path(__file__).parent
EXECUTIONS = Executions()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test for each of its module's architectures, unless it has some of its own."""
    own = any("arch" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "arch" in metafunc.fixturenames and not own:
        arches = metafunc.module.ARCHES
        metafunc.parametrize("arch", arches, ids=[f"sm_{arch}" for arch in arches])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An imported test is representative only on the architectures that its module here says; and without fp8 in the
    tensor cores (below sm_89), there is no test of fp8."""
    without = []
    for item in items:
        if HERE not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        parameters = dict(item.callspec.params)
        arch = parameters.pop("arch")
        full = any(part in item.name for part in getattr(item.module, "ONLY_FULL", ()))
        if full or arch not in item.module.REPRESENTATIVE:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "representative"]
        if arch < 89 and any(map(_has_fp8, parameters.values())):
            without.append(item)
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


def _has_fp8(value: object) -> bool:
    """Whether a test's parameter asks for fp8."""
    if isinstance(value, Precision):
        return "fp8" in (value.qk, value.pv)
    return value == torch.float8_e4m3fn or (isinstance(value, str) and "fp8" in value)


@pytest.fixture(scope="session", autouse=True)
def _compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with without_assembler(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(autouse=True)
def emulator(arch: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """All launches of a test, on ``arch``; no fault may be left when the test is over."""
    oracle_rounds_as(arch, monkeypatch)
    monkeypatch.setattr(configs, "_INTERPRETED", arch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_scratch", lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    emulator = Emulator(arch=arch)
    with emulating(emulator):
        yield emulator
    REACHED.extend((kernel, arch, ctas) for kernel, ctas, _ in EXECUTIONS.of(emulator))
    request.node.user_properties.append(("executed", [(arch, *entry) for entry in EXECUTIONS.of(emulator)]))
    assert emulator.errors == []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects what the tests executed, in whichever process they ran."""
    if report.when == "teardown":
        for name, value in report.user_properties:
            if name == "executed":
                EXECUTIONS.add(value)
            elif name == "mutants":
                EXECUTIONS.mutants += value


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each kernel and architecture."""
    for line in EXECUTIONS.lines():
        terminalreporter.write_line(line)
