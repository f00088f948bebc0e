"""Take a picture of a report for the README, in a browser: title, summary, bars, reliability
diagrams and first images.

    dad-fast train --preset demo --seeds 5 -o runs/demo
    python scripts/report_picture.py runs/demo/report.html docs/report.png

Needs the package playwright and Chromium or Chrome.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

WIDTH = 1200
# Hides the rest of the page: other sections, and all but three diagrams and four examples.
STYLE = """
  nav, ul, section:not(#summary, #accuracy-per-shift, [id^=calibration], [id^=images]) { display: none; }
  [id^=calibration] figure:nth-child(-n+3), [id^=images] figure:nth-child(n+5) { display: none; }
  h2 { margin-top: 1rem; }
"""


def main(page: str, picture: str) -> None:
    from playwright.sync_api import sync_playwright

    browsers = (
        shutil.which(name)
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    )
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=next(filter(None, browsers), None), args=["--no-sandbox"]
        )
        shown = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
        shown.goto(Path(page).resolve().as_uri())
        shown.add_style_tag(content=STYLE)
        shown.screenshot(path=picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
