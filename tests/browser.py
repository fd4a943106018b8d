"""A real browser, for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class Opened:
    """A page in the browser, what its console said, and what it asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def panel(self, title: str) -> Any:
        """The panel with this title, when it is drawn."""
        for panel in self.page.locator(".panel").all():  # each is drawn when it comes into view
            panel.scroll_into_view_if_needed()
        place: Any = self.page.locator(".panel", has=self.page.locator(".gtitle", has_text=title)).first
        place.wait_for()
        return place

    def value_under_cursor(self, title: str, curve: str, point: int) -> str:
        """Move the mouse to a point of a curve, and return the text that the page shows there."""
        panel = self.panel(title)
        panel.scroll_into_view_if_needed()
        x, y = panel.evaluate(
            """(element, [name, point]) => {
                const trace = element.data.find((one) => one.name === name);
                const { xaxis, yaxis } = element._fullLayout;
                const box = element.getBoundingClientRect();
                return [box.left + xaxis._offset + xaxis.d2p(trace.x[point]),
                        box.top + yaxis._offset + yaxis.d2p(trace.y[point])];
            }""",
            [curve, point],
        )
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y)
        shown: Any = panel.locator(".hoverlayer")
        shown.get_by_text(curve).first.wait_for()
        return str(shown.text_content())


@contextmanager
def opened(path: Path, *, width: int = 1280, scheme: str = "light") -> Iterator[Opened]:
    """Open a file in headless Chromium; skip the test where there is none."""
    found = next((program for name in NAMES if (program := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        page.set_default_timeout(20_000)
        shown = Opened(page)
        page.goto(path.resolve().as_uri())
        yield shown
        browser.close()
