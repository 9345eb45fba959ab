"""Outputs appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidaccel.errors import OutputError
from vidaccel.files import atomic_path, check_folder, check_writable, write_json


def test_the_file_appears_at_the_end_under_its_name(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".mp4"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")
    with pytest.raises(failure), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"cannot write .*out\.json: No space left"),
        atomic_path(tmp_path / "out.json"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_named_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    cases = {
        tmp_path / "missing" / "a.mp4": "does not exist; create it",
        file / "a.mp4": "is not a folder",
        tmp_path: "is a folder; name a file in it",
        Path("/proc/a.mp4"): "cannot write /proc/a.mp4",
    }
    for path, words in cases.items():
        with pytest.raises(OutputError, match=words):
            check_writable(path)
    assert list(tmp_path.iterdir()) == [file]


def test_json_has_words_for_what_json_has_no_number_for(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    write_json(target, {"psnr": float("inf"), "list": (1.5, float("nan")), 3: None})
    assert json.loads(target.read_text()) == {"psnr": "inf", "list": [1.5, "nan"], "3": None}


def test_a_folder_is_looked_at_and_not_made(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not list(tmp_path.iterdir())
    assert check_folder(tmp_path) == tmp_path and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is not a folder; choose another output"):
        check_folder(tmp_path / "file" / "b")
    with pytest.raises(OutputError, match="cannot write into the folder /proc/new: "):
        check_folder("/proc/new")
