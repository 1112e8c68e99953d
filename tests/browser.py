"""A headless Chromium for tests of pages: started and ended here, on loopback or files alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: it asks nobody for anything: updates, safe browsing and first-run pages are off
ALONE = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def chromium() -> str | None:
    """The one of CHROMIUM, or the machine's own; None: playwright's, where it has one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """A page, what it complained of, and whom it asked."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.asked: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def screenshot(self, name: str) -> None:
        """Kept where VITPARETO_SCREENSHOTS names a folder, to be looked at."""
        if place := os.environ.get("VITPARETO_SCREENSHOTS"):
            self.page.screenshot(path=Path(place) / f"{name}.png", full_page=True)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found

    def run(self, script: str) -> Any:
        return self.page.evaluate(script)
