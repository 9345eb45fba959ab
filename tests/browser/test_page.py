"""The report in a real browser: nothing is fetched, nothing complains, videos play, a phone can show it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.results import calibration, comparison, moving
from vidaccel.report import clip_of, write_page

PROMPTS = ("a red ball", "a <b>blue</b> cat & a word" + "withoutanyspaces" * 6, "not shown")

#: Elements that reach beyond the page and lie in no box of their own that scrolls.
_OVERFLOWING = """
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  if (element.ownerSVGElement || element.closest(".wide") && !element.matches(".wide")) continue;
  const box = element.getBoundingClientRect();
  if (box.width && (box.right > innerWidth + 0.5 || box.left < -0.5)) found.push(element.outerHTML.slice(0, 90));
}
if (document.documentElement.scrollWidth > innerWidth) found.push("the page itself");
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section and two of three prompts' videos."""
    result = comparison(PROMPTS)
    result["calibration"] = calibration()
    result["command"] = "vidaccel compare --prompts " + "a-rather-long-name/" * 8
    clips = [clip_of(prompt, "sta", moving(seed), moving(seed + 1), 16) for seed, prompt in enumerate(PROMPTS[:2])]
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, result, clips)
    return path


def wait(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Returns as soon as ``condition`` holds; fails after ``seconds``, which only a hang takes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_nothing_is_fetched_and_every_video_plays(visit: Any, page: Path) -> None:
    opened = visit(page)
    opened.open(width=1100, scheme="light")
    states = "return [...document.querySelectorAll('video')].map((video) => video.readyState)"
    wait(lambda: min(opened.run(states)) >= 2, "a video has no data to show")
    assert len(opened.run(states)) == 6
    opened.run(
        "window.seen = [...document.querySelectorAll('video')].map(() => 0);"
        "document.querySelectorAll('video').forEach((video, place) => video.addEventListener('timeupdate',"
        " () => { seen[place] = Math.max(seen[place], video.currentTime); }));"
        "document.getElementById('play').click();"
    )
    wait(lambda: min(opened.run("return seen")) > 0, "a video does not advance")
    assert opened.run("return document.getElementById('play').textContent") == "Pause all"
    opened.run("document.getElementById('play').click()")
    stopped = "return [...document.querySelectorAll('video')].map((video) => [video.paused, video.currentTime])"
    wait(lambda: all(paused for paused, _ in opened.run(stopped)), "a video goes on after the button said stop")
    times = [when for _, when in opened.run(stopped)]
    for group in (times[:3], times[3:]):  # a frame lasts 62 ms; players round to microseconds, each its own way
        assert max(group) - min(group) < 1e-3, "the videos of a prompt stop at the same frame"
    assert opened.requests() == [page.as_uri()], "the page alone is read, and nothing else"
    assert opened.console() == []


def test_a_request_and_a_complaint_would_be_seen(visit: Any, tmp_path: Path) -> None:
    """The same watch on a page that does what ours must not: it is not blind."""
    path = tmp_path / "bad.html"
    path.write_text('<img src="http://127.0.0.1:9/a.png"><p style="width: 900px">wide</p><script>nothing()</script>')
    opened = visit(path)
    opened.open(width=390, scheme="light")
    assert opened.requests() == [path.as_uri(), "http://127.0.0.1:9/a.png"]
    assert any("nothing is not defined" in line for line in opened.console())
    assert opened.run(_OVERFLOWING) != []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_nothing_overflows(visit: Any, page: Path, width: int, scheme: str) -> None:
    opened = visit(page)
    opened.open(width=width, scheme=scheme)
    opened.run("document.querySelectorAll('details').forEach((folded) => { folded.open = true; })")
    assert opened.run("return innerWidth") == width
    assert opened.run(_OVERFLOWING) == []
    assert opened.console() == []


def test_dark_mode_is_dark_and_figures_follow(visit: Any, page: Path) -> None:
    colours = (
        "const text = document.querySelector('.drawing svg text');"
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill]"
        ".map((colour) => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3);"
    )
    opened = visit(page)
    opened.open(width=800, scheme="light")
    paper, ink = opened.run(colours)
    assert paper > 200 and ink < 60
    opened.open(width=800, scheme="dark")
    paper, ink = opened.run(colours)
    assert paper < 60 and ink > 200


def test_everything_has_a_name_and_ids_are_unique(visit: Any, page: Path) -> None:
    opened = visit(page)
    opened.open(width=1100, scheme="light")
    nameless = (
        "return [...document.querySelectorAll('svg[role=img], video, [role=region]')]"
        ".filter((element) => !element.ariaLabel).length"
    )
    assert opened.run(nameless) == 0
    ids = opened.run("return [...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids)) > 50
    unscoped = opened.run("return [...document.querySelectorAll('th:not([scope])')].length")
    assert unscoped == 0
    labelled = opened.run(
        "return [...document.querySelectorAll('[aria-labelledby]')]"
        ".every((part) => document.getElementById(part.getAttribute('aria-labelledby')) !== null)"
    )
    assert labelled
    titles = opened.run("return [...document.querySelectorAll('h3')].map((heading) => heading.textContent)")
    assert f"2. {PROMPTS[1]}" in titles, "a prompt is text, whatever is in it"


def test_the_keyboard_reaches_the_button_and_the_tables(visit: Any, page: Path) -> None:
    opened = visit(page)
    opened.open(width=390, scheme="light")
    reachable = opened.run(
        "return [...document.querySelectorAll('button, .wide, pre, summary')].every((element) => element.tabIndex >= 0)"
    )
    assert reachable
    opened.run("document.getElementById('play').focus()")
    assert opened.run("return document.activeElement.id") == "play"
