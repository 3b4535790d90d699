"""A real browser for the tests of pages: a headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Tests run as root too, where Chromium wants no sandbox; and it asks nobody about updates.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def page(*, offline: bool = False, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """An empty page in a browser of its own; offline, it reaches nothing but files, not even this machine's servers.

    Skips the test where Playwright or Chromium is missing.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason='no Playwright; pip install -e ".[test]"')
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(NAMES)} is in the PATH")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=program, args=ARGUMENTS, timeout=1000 * PATIENCE_SECONDS)
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        context.set_offline(offline)
        context.set_default_timeout(1000 * PATIENCE_SECONDS)
        try:
            yield context.new_page()
        finally:
            browser.close()
