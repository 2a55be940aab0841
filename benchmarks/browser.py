"""Chromium for benchmarks of pages."""

import contextlib
import shutil
import time
from collections.abc import Iterator

from playwright.sync_api import Page, sync_playwright

_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PAN = """async () => {
  const map = window.localagg.map, times = [];
  map.zoom(1.5);
  for (let i = 0, last = performance.now(); i < 60; i++) {
    map.dx += 4;
    map.redraw();
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    times.push(now - last), (last = now);
  }
  times.sort((a, b) => a - b);
  return 1000 / times[30];
}"""
"""Frames a second of panning, the median of 60."""


@contextlib.contextmanager
def open_browser() -> Iterator[Page]:
    """Yield an empty page of Debian's Chromium, 1280 x 900, without a GPU."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto("about:blank")
        yield page
        browser.close()


def press_key(page: Page, address: str) -> tuple[float, float]:
    """Open a page and choose an image by key; return seconds to the map, and to its neighbors."""
    start = time.perf_counter()
    page.goto(address, wait_until="commit")
    while not page.evaluate("window.localagg?.map.width"):  # a policy may forbid waiting for code
        time.sleep(0.01)
    mapped = time.perf_counter() - start
    page.locator(".stage > canvas").press("ArrowRight")
    page.wait_for_selector(".side .path")
    return mapped, time.perf_counter() - start
