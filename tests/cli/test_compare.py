"""``vidaccel compare`` on a tiny pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from vidaccel.quality import BANDS

pytestmark = pytest.mark.full

PLAN = """
name: window
tile: [1, 1, 2]
rules:
  - pattern: {name: neighborhood, window: [1, 1, 1]}
"""


@pytest.fixture
def window(tmp_path: Path) -> Path:
    """A plan file narrow enough to change tiny videos."""
    path = tmp_path / "window.yaml"
    path.write_text(PLAN)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three prompts, with a comment and an empty line that do not count."""
    path = tmp_path / "prompts.txt"
    path.write_text("# shapes\na red ball\n\n  a blue cat  \na green circle\n", encoding="utf-8")
    return path


def test_figures_sheet_and_table(
    vidaccel: Callable[..., Any],
    tiny_model: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    window: Path,
    prompts: Path,
) -> None:
    files = ("--json", tmp_path / "c.json", "--sheet", tmp_path / "c.png")
    options = ("--limit", 2, "--controls", 1, "--seed", 4)
    options += ("--plan", window, "--prompts", prompts, *small, *files)
    result = vidaccel("compare", "-m", tiny_model, *options, env={"COLUMNS": "160"})
    made = json.loads((tmp_path / "c.json").read_text())
    assert [row["prompt"] for row in made["prompts"]] == ["a red ball", "a blue cat"]
    assert made["plan"] == "window" and all(row["seed"] == 4 for row in made["prompts"])
    first, second = made["prompts"]
    again = first["controls"]["dense again"]
    assert again == {"psnr": "inf", "ssim": pytest.approx(1.0), "flicker": 0.0, "latent_error": 0.0, "lpips": None}
    assert set(second["controls"]) == {"dense, another prompt"}, "the control that costs no run"
    assert second["seconds"]["dense"]["attention"] is None
    assert first["flicker"] > 0 and first["latent_error"] > 0 and first["lpips"] is None
    assert made["verdict"]["prompts"][0] in BANDS and "LPIPS is not measured" in made["notes"][0]
    assert made["coverage"]["calls"] == sum(row["report"]["calls"] for row in made["prompts"])
    assert made["command"].split()[0] == "vidaccel" and made["created"].endswith("UTC")
    for row in (first, second):
        assert 5 < row["psnr"] < 100 and 0 < row["density"] < 1
        assert row["seconds"]["plan"]["attention"] > 0
        assert set(row["seconds"]["dense"]) == {"text", "denoise", "decode", "other", "total", "attention"}
    summary = made["summary"]
    assert summary["psnr"]["mean"] == pytest.approx((first["psnr"] + second["psnr"]) / 2)
    assert summary["psnr"]["low"] < summary["psnr"]["mean"] < summary["psnr"]["high"]
    assert made["settings"]["arguments"]["height"] == 48 and made["machine"]["cores"] >= 1
    height, width, _ = cv2.imread(str(tmp_path / "c.png")).shape
    assert height > 2 * 3 * 100 and width > 8 * 140  # two prompts of three rows, eight frames
    assert "bit-identical in 1 of 1 runs" in result.stdout
    assert "control: dense again" in result.stdout and "mean seconds by stage" in result.stdout


def test_the_page_has_the_first_videos_and_all_figures(
    vidaccel: Callable[..., Any],
    tiny_model: Path,
    small: tuple[str, ...],
    tmp_path: Path,
    window: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/vidaccel", "compare", "--prompt", "it's 5 $"])
    options = ("--plan", window, "--prompts", prompts, "--controls", 0, *small, "--html", tmp_path / "c.html")
    vidaccel("compare", "-m", tiny_model, *options, "--html_videos", 2)
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert page.count("<video ") == 2 * 3 and "The first 2 of 3 prompts" in page
    assert "3. a green circle" in page, "prompts without videos are in the table"
    assert "vidaccel compare --prompt &#39;it&#39;&#34;&#39;&#34;&#39;s 5 $&#39;" in page, "quoted for a shell"
    assert "use --controls 1 or more" in page, "why there is no verdict"


def test_prompts_from_stdin_and_options(
    vidaccel: Callable[..., Any], tiny_model: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    given = ("--prompts", "-", "--prompt", "a red cat", "--controls", 0, "--json", tmp_path / "c.json")
    vidaccel("compare", "-m", tiny_model, "--plan", "dense", *given, *small, input="a blue ball\n")
    made = json.loads((tmp_path / "c.json").read_text())
    assert [row["prompt"] for row in made["prompts"]] == ["a red cat", "a blue ball"]
    assert [row["psnr"] for row in made["prompts"]] == ["inf", "inf"], "the dense plan changes nothing"
    assert made["summary"]["psnr"] == {"mean": None, "low": None, "high": None, "count": 0, "infinite": 2}


def test_bad_input_is_one_sentence(
    refused: Callable[..., str], tiny_model: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vidaccel.cli.options.open_pipeline", loaded)
    assert "there are no prompts" in refused("compare", "-m", tiny_model)
    assert "cannot be read: No such file" in refused("compare", "--prompts", tmp_path / "no.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    assert "not text in UTF-8" in refused("compare", "--prompts", tmp_path / "binary.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    assert "there are no prompts" in refused("compare", "--prompts", tmp_path / "empty.txt")
    assert "does not end in .png" in refused("compare", "--prompts", prompts, "--sheet", tmp_path / "c.jpg")
    assert "name it c.html" in refused("compare", "--prompts", prompts, "--html", tmp_path / "c.pdf")
    assert "create it first" in refused("compare", "--prompts", prompts, "--json", tmp_path / "no" / "c.json")
    assert "presets are" in refused("compare", "--prompts", prompts, "--plan", "nonsense")
