"""The script that runs the tests under other arithmetic goes on behind a red setting, and says what did not run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import settings
from tests.settings import Setting

OUTPUT = {
    "1": (1, "FAILED tests/test_a.py::test_b - assert 1\n==== 1 failed, 3 passed, 2 skipped in 1.00s ====\n"),
    "4": (0, "==== 4 passed in 1.00s ====\n"),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments that pytest was started in, which fails with one thread and passes with four."""
    environments: list[dict[str, str]] = []

    def start(command: list[str], *, env: dict[str, str] | None = None, **_: Any) -> Any:
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, "abc1234\n", "")
        assert env is not None
        environments.append(env)
        code, said = OUTPUT[env.get("VIDACCEL_TEST_THREADS", "4")]
        return subprocess.CompletedProcess(command, code, said, "")

    monkeypatch.setattr(settings.subprocess, "run", start)
    monkeypatch.setattr(settings, "cpu", lambda: ("A CPU", {"avx2"}))
    monkeypatch.setattr(
        settings,
        "SETTINGS",
        (
            Setting("one thread", {"VIDACCEL_TEST_THREADS": "1"}),
            Setting("large vectors", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512bw"),
            Setting("four threads", {"VIDACCEL_TEST_THREADS": "4"}, "avx2"),
        ),
    )
    return environments


def test_every_setting_runs_whatever_fails(
    ran: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "SSE4_2")
    monkeypatch.setattr("sys.argv", ["settings", "--write", str(tmp_path / "page.md")])
    assert settings.main() == 1
    assert [env["VIDACCEL_TEST_THREADS"] for env in ran] == ["1", "4"]
    assert not any("MKL_ENABLE_INSTRUCTIONS" in env for env in ran), "nothing of the caller's own"
    page = (tmp_path / "page.md").read_text()
    assert (
        "| one thread | `VIDACCEL_TEST_THREADS=1` | 3 | 1 `tests/test_a.py::test_b` |" in page
        and "| `VIDACCEL_TEST_THREADS=4` | 4 | 0 |" in page
    )
    assert "| large vectors | `ONEDNN_MAX_CPU_ISA=AVX512_CORE` | not run: this CPU has no avx512bw |" in page
    assert ", A CPU (avx2), torch" in page and "| 0 | abc1234 |" in page
    assert "test_b" in capsys.readouterr().out


def test_one_setting_by_name(ran: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["settings", "--only", "four threads"])
    assert settings.main() == 0 and len(ran) == 1
    monkeypatch.setattr("sys.argv", ["settings", "--only", "five threads"])
    with pytest.raises(SystemExit):
        settings.main()
    page = tmp_path / "page.md"
    monkeypatch.setattr("sys.argv", ["settings", "--only", "four threads", "--write", str(page)])
    with pytest.raises(SystemExit):
        settings.main()
    assert len(ran) == 1 and not page.exists(), "a page of part of the settings would pass for one of all"
