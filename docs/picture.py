"""Take a picture of the map on a report page: python docs/picture.py PAGE PICTURE.png [COLUMN].

COLUMN colors the points. docs/photos.png is of ``pretrain adapt`` on clothing photos without
labels, by cluster.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    page_file, picture = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    color = sys.argv[3] if len(sys.argv) > 3 else "cluster"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1180, "height": 760}, device_scale_factor=1.5)
        page.goto(page_file.as_uri())
        page.get_by_label("Color by").select_option(color)
        page.locator(".stage > canvas").focus()
        page.keyboard.press("ArrowLeft")  # an image of the middle, with its neighbors
        page.wait_for_selector(".side .path")
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(500)
        page.locator(".map-part").screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
