"""Take docs/demo.png of the page that ``localagg demo`` wrote: python docs/demo_picture.py PAGE."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    page_file = Path(sys.argv[1]).resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1180, "height": 760}, device_scale_factor=1.5)
        page.goto(page_file.as_uri())
        page.get_by_label("Color by").select_option("label")
        page.locator(".stage > canvas").focus()
        page.keyboard.press("ArrowLeft")  # an image of the middle, with its neighbors
        page.wait_for_selector(".side .path")
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(500)
        page.locator(".map-part").screenshot(path=Path(__file__).with_name("demo.png"))
        browser.close()


if __name__ == "__main__":
    main()
