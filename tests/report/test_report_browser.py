"""The report in a browser: no errors, fits the screen, legible in both colour schemes and print."""

from __future__ import annotations

import shutil

import pytest
import report_runs as made

from dad_fast.report.page import page
from dad_fast.report.runs import load

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(PATH is None, reason=f"needs a browser: {', '.join(BROWSERS)}")

# Elements that are wider than the screen, except those inside a box that scrolls on its own.
TOO_WIDE = """() => {
  const wide = [], width = document.documentElement.clientWidth;
  for (const one of document.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect();
    const scrolled = one.parentElement.closest(".scroll, pre, svg");
    const outside = box.right > width + 0.5 || box.left < -0.5;
    if (!scrolled && box.width && outside) wide.push(one.tagName + " " + one.textContent.slice(0, 40));
  }
  return wide;
}"""
# Text whose contrast with the page is below 4.5 (WCAG AA). Text in drawings is filled, other text
# coloured.
FAINT = """() => {
  const light = (text) => {
    const part = text.match(/[\\d.]+/g).slice(0, 3).map(value => value / 255);
    const line = part.map(
      value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2];
  };
  const back = light(getComputedStyle(document.body).backgroundColor), faint = [];
  const tags = "h1, h2, h3, p, li, td, th, figcaption, small, summary, text, .tile span";
  for (const one of document.querySelectorAll(tags)) {
    const style = getComputedStyle(one);
    const fore = light(one.tagName === "text" ? style.fill : style.color);
    const contrast = (Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05);
    if (contrast < 4.5) faint.push(one.tagName + " " + one.textContent.slice(0, 40));
  }
  return faint;
}"""
# The smallest text on the screen, in CSS pixels: a drawing's text shrinks with the drawing.
SMALLEST = """() => {
  const tags = "svg text, td, th, li, figcaption, .tile span";
  const shown = [...document.querySelectorAll(tags)].filter(one => one.getClientRects().length);
  const scale = one => one.tagName === "text" ? one.getScreenCTM().a : 1;
  return Math.min(...shown.map(one => parseFloat(getComputedStyle(one).fontSize) * scale(one)));
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A single run, a comparison of three seeds, and runs with hostile names, one in progress."""
    root = tmp_path_factory.mktemp("pages")
    record = made.with_classes(made.write_run(root / "single", "dad", "dad"))
    made.write_json(root / "single/results.json", record)
    made.write_comparison(root / "comparison", seeds=3)
    hostile = []
    for number in range(12):
        folder = root / f"run-{number}-{'very-long-name-' * 6}"
        facts = made.GPU | {"cpu": made.HOSTILE, "packages": {made.HOSTILE: made.HOSTILE}}
        record = made.write_run(
            folder,
            made.HOSTILE,
            "dad",
            facts=facts,
            power=500.0 + number,
            finished=number != 11,
            settings={
                "student.name": made.HOSTILE.replace("\ud800", ""),
                "optim.lr": 10.0**-number,
            },
        )
        record["suites"] |= {made.HOSTILE: made.result(50.0)}
        record["teacher"]["name"] = record["teacher"]["seen"] = made.HOSTILE
        made.write_images(folder, labels=(made.HOSTILE, "two"))
        if number != 11:
            made.write_json(folder / "results.json", {**record, "variant": "v"})
        hostile.append(folder)
    files = {}
    for name, folders in (
        ("single", [root / "single"]),
        ("comparison", [root / "comparison"]),
        ("hostile", hostile),
    ):
        files[name] = root / f"{name}.html"
        files[name].write_text(page(load(folders)))
    return files


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("name", ["single", "comparison", "hostile"])
def test_page_fits_the_screen_and_is_legible(browser, pages, name, width, scheme):
    shown, problems = _open(
        browser, pages[name], viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    assert problems == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate(TOO_WIDE) == []
    assert shown.evaluate(FAINT) == []
    assert shown.evaluate(SMALLEST) >= 10
    dark = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")
    assert shown.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert shown.evaluate("document.scripts.length") == 0
    shown.context.close()


@pytest.mark.parametrize("name", ["single", "comparison", "hostile"])
def test_page_prints_black_on_white(browser, pages, name):
    """On A4: black on white for any colour scheme, nothing hidden in a box that scrolls."""
    # A4 without its margins.
    paper = {"width": 703, "height": 1000}
    shown, problems = _open(browser, pages[name], viewport=paper, color_scheme="dark")
    shown.emulate_media(media="print")
    assert problems == []
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.evaluate(FAINT) == []
    hidden = """[...document.querySelectorAll('.scroll')].filter(
        one => getComputedStyle(one).overflowX !== 'visible').length"""
    assert shown.evaluate(hidden) == 0
    # Twelve columns of long words are wider than paper.
    if name != "hostile":
        right = """Math.max(...[...document.querySelectorAll('table')].map(
            one => one.getBoundingClientRect().right))"""
        assert shown.evaluate(right) <= 703
    assert shown.pdf(format="A4")[:5] == b"%PDF-"
    shown.context.close()


def test_first_column_and_caption_stay_while_a_table_scrolls(browser, pages):
    """On a phone of 375 pixels, which leaves room for two numbers beside the names."""
    shown, _ = _open(browser, pages["comparison"], viewport={"width": 375, "height": 800})
    for table in shown.query_selector_all("#result .scroll:not(details *)"):
        table.evaluate("one => { one.scrollLeft = 150 }")
        assert table.evaluate("one => one.scrollLeft") > 100
        left = table.bounding_box()["x"]
        for part in ("tbody th", "caption span"):
            box = table.query_selector(part).bounding_box()
            assert box["x"] == pytest.approx(left, abs=1)
        names = table.query_selector("tbody th").bounding_box()["width"]
        assert names <= 0.45 * table.bounding_box()["width"]
    shown.context.close()


def test_tables_and_details_are_reachable_by_keyboard(browser, pages):
    """Boxes that scroll and folded content can be reached with the tab key."""
    shown, _ = _open(browser, pages["comparison"], viewport={"width": 360, "height": 800})
    reached = set()
    for _ in range(40):
        shown.keyboard.press("Tab")
        reached.add(
            shown.evaluate("document.activeElement.className || document.activeElement.tagName")
        )
    assert {"scroll", "SUMMARY"} <= reached
    shown.context.close()


def _open(browser, path, **options):
    """Open a page; return it with its console messages, errors, and requests to other files."""
    shown = browser.new_context(**options).new_page()
    problems: list[str] = []
    shown.on("console", lambda message: problems.append(message.text))
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on("dialog", lambda dialog: problems.append(dialog.message))
    shown.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:")) else problems.append(request.url)
        ),
    )
    shown.goto(path.as_uri())
    return shown, problems
