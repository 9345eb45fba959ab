"""These tests run only where they are asked for (``make test-kernels``), each folder in a process of its own.

``interpreter/`` needs TRITON_INTERPRET=1 from before Triton's first import, ``gate/`` and ``ptx/`` need it unset; all
need a Triton, which the ordinary environment has not. In the wrong place they fail instead of being skipped.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    """Refuses the wrong mode, and repairs the interpreter before a test module imports a kernel."""
    config.addinivalue_line("markers", "triton(version): runs with this version of Triton only, for example '3.6'")
    config.addinivalue_line("markers", "representative: with the others so marked, reaches every kernel and precision")
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
