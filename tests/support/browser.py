"""Debian's Chromium, without a screen, as somebody who looks at a page would use it.

Rules of this file: every wait has a deadline; a page that writes an error to its console fails its test.
"""

import base64
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from support.processes import DEADLINE

T = TypeVar("T")

_SEEN = "return document.body.innerText"

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs a browser (apt-get install chromium chromium-driver)",
)
DESKTOP, PHONE = (1440, 900), (390, 844)
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # which root, as in CI, cannot have
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--lang=en-GB",
)


class Browser:
    """One window. Made by ``browser``."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, url: str) -> None:
        """Go to a page, as if for the first time."""
        self._driver.get(url)
        self.run("localStorage.clear(); sessionStorage.clear()")
        self._driver.get(url)

    def reload(self) -> None:
        """Load the page again, with what it has kept."""
        self._driver.refresh()

    def look_like(self, size: tuple[int, int], *, dark: bool = False) -> None:
        """A screen of that size, of a phone where it is narrow, and of these colours."""
        width, height = size
        phone = width < 600
        self._tell(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone},
        )
        wishes = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce",  # else a screenshot catches things half-way
        }
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self._tell("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, file: Path, *, sharp: int = 1) -> None:
        """What is seen now; ``sharp`` pixels for each of the page's."""
        width, height = self.run("return [innerWidth, innerHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": sharp}
        taken = self._tell("Page.captureScreenshot", {"format": "png", "clip": clip})
        file.write_bytes(base64.b64decode(taken["data"]))

    def all(self, selector: str) -> list[WebElement]:
        """The elements that a selector finds now."""
        return self._driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Their texts, seen or not."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())",
            selector,
        )
        return found

    def text(self, selector: str) -> str:
        """That of the first one; empty if there is none."""
        return next(iter(self.texts(selector)), "")

    def click(self, selector: str) -> None:
        """Click on the first one, when it can be seen."""
        self.wait(lambda: any(element.is_displayed() for element in self.all(selector)))
        next(element for element in self.all(selector) if element.is_displayed()).click()

    def write(self, selector: str, text: str) -> None:
        """Put a text into a field in place of what is there."""
        field = self.all(selector)[0]
        field.clear()
        field.send_keys(text)

    def run(self, script: str, *arguments: object) -> Any:
        """Run JavaScript in the page."""
        return self._driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], T], timeout: float = DEADLINE) -> T:
        """What ``condition`` gives once it is true; elements may go while one looks at them."""
        until = time.monotonic() + timeout
        while True:
            with contextlib.suppress(WebDriverException):
                if value := condition():
                    return value
            if time.monotonic() > until:
                raise AssertionError(f"not within {timeout:.0f} s; the page:\n{self.run(_SEEN)}")
            time.sleep(0.05)

    def names_of_controls(self) -> list[str]:
        """What somebody who does not see the page is told of buttons and fields."""
        self._tell("Accessibility.enable", {})
        nodes = self._tell("Accessibility.getFullAXTree", {})["nodes"]
        kinds = ("button", "textbox", "combobox", "spinbutton", "link")
        return [
            node.get("name", {}).get("value", "")
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in kinds
        ]

    def complaints(self) -> list[str]:
        """The errors in the console since the last call: scripts, files, policies."""
        entries: Any = self._driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def _tell(self, command: str, arguments: dict[str, Any]) -> Any:
        return self._driver.execute_cdp_cmd(command, arguments)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in ``folder``, gone afterwards."""
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None and DRIVER is not None, "the tests are skipped"
    options.binary_location = CHROMIUM
    for option in (*_OPTIONS, f"--user-data-dir={folder}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
