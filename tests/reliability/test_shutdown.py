"""Nothing of ours speaks after the end of a process, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]

START = """
import sys, threading
import torch, vidaccel
from tests.zoo.wan import CASES
from tests.reliability.plans import SPARSE
torch.set_num_threads(1)
pipe = CASES[0].make()
plan = vidaccel.Plan("cached", SPARSE.rules, tile=SPARSE.tile, cache="first-block:0.1")
session = vidaccel.patch(pipe, plan)
CASES[0].run(pipe)
sys.stderr.flush()
print("ran", file=sys.stderr, flush=True)
"""

ENDS = {
    "by itself": "",
    "by an exception": "raise KeyError('of the user')",
    "in a callback": "CASES[0].run(pipe, callback_on_step_end=lambda *_: sys.exit(3))",
    "with a thread": "threading.Thread(target=lambda: CASES[0].run(pipe)).start()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_in_silence(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + ENDS[end]],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    _, ran, after = done.stderr.partition("ran\n")
    assert ran, done.stderr
    assert done.returncode == {"by an exception": 1, "in a callback": 3}.get(end, 0)
    if end == "by an exception":
        assert after.rstrip().endswith("KeyError: 'of the user'") and after.count("Traceback") == 1
    else:
        assert after == ""
