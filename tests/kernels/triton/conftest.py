"""These tests run only where they are asked for (``make test-kernels``), each folder in a process of its own.

``interpreter/`` needs TRITON_INTERPRET=1 from before Triton's first import, ``gate/`` and ``ptx/`` need it unset; all
need a Triton, which the ordinary environment has not. In the wrong place they fail instead of being skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import pytest

from tests.kernels.triton.proofs import REACHED, Proof

HERE = Path(__file__).parent
PROOF = pytest.StashKey[Proof]()
CONFIG: list[pytest.Config] = []
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to keep what a run did; see proofs.py."""
    parser.addoption("--proof", type=Path, default=None, metavar="FOLDER", help="keep which kernels were reached there")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses the wrong mode, and repairs the interpreter before a test module imports a kernel."""
    config.addinivalue_line("markers", "triton(version): runs with this version of Triton only, for example '3.6'")
    config.addinivalue_line("markers", "representative: with the others so marked, reaches every kernel and precision")
    CONFIG[:] = [config]
    asked = _asked(config)
    folders = {path.relative_to(HERE).parts[0] if path != HERE else "all of it" for path in asked}
    if not folders:
        return
    wrong = None
    if not TRITON:
        wrong = "Triton cannot be imported"
    elif len(folders) > 1 or "all of it" in folders:
        wrong = "its folders need processes of their own"
    elif "interpreter" in folders and not INTERPRETED:
        wrong = "TRITON_INTERPRET is not 1"
    elif folders & {"gate", "ptx"} and INTERPRETED:
        wrong = "TRITON_INTERPRET is 1"
    if wrong:
        raise pytest.UsageError(
            f"tests/kernels/triton ({', '.join(sorted(folders))}) cannot run: {wrong}; use make test-kernels"
        )
    if INTERPRETED:
        from tests.kernels.triton.interpreter import interpreter

        interpreter.install()
    _count(folders)
    config.stash[PROOF] = Proof(min(folders), importlib.metadata.version("triton"), config.option.markexpr)


def _count(folders: set[str]) -> None:
    """Lets the interpreter and the gate say what they reach; the emulator says it itself."""
    if "interpreter" in folders:
        from triton.runtime.interpreter import GridExecutor

        call = GridExecutor.__call__

        def counted(self: GridExecutor, *args: object, **kwargs: object) -> object:
            REACHED.append((self.fn.__name__, 0, 1))
            return call(self, *args, **kwargs)

        GridExecutor.__call__ = counted
    elif "gate" in folders:
        from vidaccel.kernels.triton import gate

        read = gate._read_nvidia

        def noted(arch: int, compiled: object, log: str) -> gate.MachineCode:
            code = read(arch, compiled, log)
            REACHED.append((code.kernel, arch, 1))
            return code

        gate._read_nvidia = noted


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What the test reached goes with its report, from whichever process."""
    item.user_properties.append(("reached", REACHED.copy()))
    REACHED.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects it."""
    proof = CONFIG[0].stash.get(PROOF, None)
    if proof is not None and report.failed:
        proof.failed = True
    if proof is not None and report.when == "teardown":
        for name, value in report.user_properties:
            if name == "reached":
                proof.add(value)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keeps it, once and not in every process."""
    folder = session.config.getoption("--proof", None)
    proof = session.config.stash.get(PROOF, None)
    if folder is not None and proof is not None and not hasattr(session.config, "workerinput"):
        proof.write(folder)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out what the run was not pointed at by name."""
    here = {collection_path, *collection_path.parents}
    return None if any(path in here or collection_path in path.parents for path in _asked(config)) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is for another version of Triton."""
    for item in items:
        for mark in item.iter_markers("triton"):
            import triton

            (version,) = mark.args
            if not f"{triton.__version__}.".startswith(f"{version}."):
                item.add_marker(pytest.mark.skip(reason=f"for Triton {version}, this is {triton.__version__}"))


def _asked(config: pytest.Config) -> list[Path]:
    """The paths in this folder that the run was pointed at."""
    paths = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    return [path for path in paths if path == HERE or HERE in path.parents]
