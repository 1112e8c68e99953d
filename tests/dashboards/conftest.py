"""One browser per test file and one tab per test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser import OPTIONS, Tab, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=chromium(), args=list(OPTIONS))
        except Error as error:
            pytest.skip(
                "needs a Chromium: apt-get install chromium, or name one in CHROMIUM "
                f"({str(error).splitlines()[0]})"
            )
        yield found
        found.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(30_000)
    yield Tab(page)
    page.close()
