"""The page holds what the result holds, needs nothing else, and is written whole or not at all."""

from __future__ import annotations

import base64
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from tests.report.results import calibration, comparison, moving
from vidaccel.errors import OutputError
from vidaccel.report import clip_of, render_page, write_page
from vidaccel.report.page import check_page_path
from vidaccel.report.sheets import difference

pytestmark = pytest.mark.full


class _Parsed(HTMLParser):
    """Elements with their attributes, the text between them, and tags that were never closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "input", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def full() -> str:
    """A page with every section."""
    result = comparison()
    result["calibration"] = calibration()
    return render_page(result, [clip_of("a red ball", "sta", moving(0), moving(1), 16)])


def test_it_is_well_formed_and_says_everything(full: str) -> None:
    page = _Parsed(full)
    assert page.open == []
    for said in (
        "plan sta against dense", "speed-up", "verdict", "control: dense again", "What ran sparse", "64 of 80",
        "a mask the plan cannot hold", "blocks.*.attn2", "tokens are in tile order", "a gpu (80 GiB)",
        "vidaccel compare --prompt 'a red ball'", "2026-01-31 12:00 UTC", "LPIPS is not measured: no weights.",
        "Rank correlation 0.930", "Error against cost", "Eight prompts were watched",
    ):  # fmt: skip
        assert said in page.text, said


def test_nothing_in_it_points_outside(full: str) -> None:
    """Attributes that fetch hold data or a place in the page; addresses of XML namespaces are only names."""
    fetching = {"src", "href", "xlink:href", "srcset", "poster", "data", "action"}
    for tag, attributes in _Parsed(full).elements:
        for name in fetching & attributes.keys():
            value = attributes[name] or ""
            assert value.startswith(("data:", "#")), f"{tag} {name}={value[:60]}"
    assert not re.findall(r"url\((?!#)", full) and "@import" not in full
    assert "default-src 'none'" in full, "the browser is told to fetch nothing, too"


def test_text_is_text(full: str) -> None:
    """Prompts, reasons and titles come from outside; none of them becomes markup or a formula."""
    assert "<b>cat</b>" not in full and "a &lt;b&gt;cat&lt;/b&gt; &amp; 5 $ more$" in full
    assert "<i>" not in full and "noise $x$ &lt;i&gt;" in full


def test_videos_are_the_videos(full: str, tmp_path: Path) -> None:
    """Decoded again, each is what went in, up to lossy coding."""
    sources = re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', full)
    dense, planned = moving(0), moving(1)
    expected = (dense, planned, difference(dense, planned))
    assert len(sources) == 3
    for place, (source, frames) in enumerate(zip(sources, expected, strict=True)):
        path = tmp_path / f"{place}.mp4"
        path.write_bytes(base64.b64decode(source))
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path)]
        raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
        seen = np.frombuffer(raw.stdout, np.uint8).reshape(frames.shape)
        assert np.abs(seen.astype(int) - frames).mean() < 6, place


def test_few_videos_of_many_prompts_are_admitted() -> None:
    result = comparison(("one", "two", "three"))
    clips = [clip_of("one", "sta", moving(0), moving(1), 16)]
    assert "The first 1 of 3 prompts" in _Parsed(render_page(result, clips)).text
    alone = _Parsed(render_page(comparison(("one",)), clips))
    assert "The first" not in alone.text
    without = render_page(result)
    assert "<video" not in without and "<script" not in without, "a page without videos needs no script"


def test_ids_are_unique(full: str) -> None:
    ids = [attributes["id"] for _, attributes in _Parsed(full).elements if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "dropped", [(), ("heatmaps",), ("mass", "front", "chosen"), ("prediction", "rank_correlation"), ("predicted",)]
)
def test_sections_come_only_with_their_figures(dropped: tuple[str, ...]) -> None:
    headings = {
        "heatmaps": "Precision", "mass": "Attention mass", "front": "Error against cost",
        "prediction": "Predicted against measured error",
    }  # fmt: skip
    known = {key: value for key, value in calibration(2, 2).items() if key not in dropped}
    found = re.findall(r"<h3>([^<]+)</h3>", render_page({"plan": "mine", "calibration": known}))
    for key, heading in headings.items():
        assert (heading in found) == (key not in dropped), key


def test_totals_stand_beside_each_other(full: str) -> None:
    """Predicted 0.66, 5 s, .3; measured by the validation pairs (latent error .2) or given."""
    text = _Parsed(full).text
    assert "latent error, relative L2 0.66 0.2 seconds 5 5.2 density 0.3 0.3 PSNR, dB - 25.00 ± 12.71" in text


def test_a_calibration_alone_is_a_page() -> None:
    """Before any pair is measured, and with nothing known but notes."""
    page = _Parsed(render_page({"plan": "mine", "calibration": calibration(2, 2)}))
    assert "Calibration: plan mine" in page.text and "Prompt by prompt" not in page.text
    little = _Parsed(render_page({"plan": "mine", "calibration": {"notes": ["nothing yet"]}}))
    assert "nothing yet" in little.text and little.open == []


@pytest.mark.parametrize(
    "broken",
    [
        {"prediction": [{"predicted": 0.0, "measured": 1.0}, {"predicted": None, "measured": 2.0}]},
        {"heatmaps": {"error": [{"title": "a", "values": [[0.0, 0.0]]}], "density": [{"title": "a", "values": [[1]]}]}},
        {"heatmaps": {"error": [{"title": "a", "values": [[None, None]]}]}},
        {"heatmaps": {"precision": [{"title": "a", "values": [["bf16"]]}]}},
        {"front": [{"density": 0.1, "seconds": 1.0, "error": 0.0}]},
        {"front": [{"density": 0.1, "seconds": None, "error": 0.2}], "chosen": {"density": 0.1, "error": 0.2}},
        {"mass": [{"title": "a", "candidates": ["one"], "mean": [0.5], "low": [0.5], "high": [0.5]}]},
        {"rank_correlation": None, "predicted": {"error": 1.0}, "measured": {}},
    ],
    ids=lambda broken: ",".join(broken),
)
def test_thin_figures_do_not_break_it(broken: dict[str, Any]) -> None:
    assert _Parsed(render_page({"plan": "mine", "calibration": broken})).open == []


def test_identical_videos_are_called_so() -> None:
    """A dense plan: every PSNR is infinite, as a float here and as a text in the JSON file."""
    result = comparison(("one",))
    for value in (float("inf"), "inf"):
        result["prompts"][0]["psnr"] = value
        result["summary"]["psnr"] = {"mean": None, "low": None, "high": None, "count": 0, "infinite": 1}
        page = _Parsed(render_page(result))
        assert "identical" in page.text and "inf" not in page.text.replace("inference", "")


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("before")
    monkeypatch.setattr("vidaccel.files.os.replace", _full)
    with pytest.raises(OutputError, match="No space left"):
        write_page(path, comparison(("one",)))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="name it r.html"):
        check_page_path(tmp_path / "r.pdf")
