"""A headless Chromium with a fresh profile that logs every request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_BROWSERS, _DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--hide-scrollbars",
)


def _first(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, driven by selenium; skips with the way to get it where it is missing."""
    chromium, driver = _first(_BROWSERS), _first(_DRIVERS)
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver; on Debian: apt-get install chromium chromium-driver")
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium; pip install selenium")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # with the driver's path given, selenium looks for none on the network
    opened = selenium.Chrome(options=options, service=selenium.chrome.service.Service(executable_path=driver))
    opened.set_page_load_timeout(60)
    opened.set_script_timeout(60)
    yield opened
    opened.quit()


class Visit:
    """A page that was opened, and what the browser logged meanwhile."""

    def __init__(self, browser: Any, page: Path) -> None:
        self.browser, self.page = browser, page

    def open(self, *, width: int, scheme: str) -> None:
        """Load the page anew at this width in pixels, ``light`` or ``dark``."""
        self.browser.get("about:blank")
        for kind in ("performance", "browser"):
            self.browser.get_log(kind)  # reading empties it
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        self.browser.get(self.page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script's ``return``."""
        return self.browser.execute_script(script, *arguments)

    def requests(self) -> list[str]:
        """Addresses of all requests since `open`, those for data inside the page left out."""
        entries = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [entry for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        addresses = [entry["params"]["request"]["url"] for entry in sent]
        return [address for address in addresses if not address.startswith(("data:", "about:"))]

    def console(self) -> list[str]:
        """What the console said since `open`, of any level."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def visit(browser: Any) -> Any:
    """Opens pages."""
    return lambda page: Visit(browser, page)
