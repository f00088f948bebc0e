"""The report as a browser shows it: no errors, nothing wider than the screen, readable in both colour schemes and in print."""

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

# Elements that are wider than the screen, but for those inside a box that scrolls by itself.
TOO_WIDE = """() => {
  const wide = [], width = document.documentElement.clientWidth;
  for (const one of document.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect();
    const scrolled = one.parentElement.closest(".scroll, pre, svg");
    if (!scrolled && box.width && (box.right > width + 0.5 || box.left < -0.5)) wide.push(one.tagName + " " + one.textContent.slice(0, 40));
  }
  return wide;
}"""
# Text whose contrast with the page is below 4.5 (WCAG AA); text in drawings is filled, other text coloured.
FAINT = """() => {
  const light = (text) => {
    const part = text.match(/[\\d.]+/g).slice(0, 3).map(value => value / 255);
    const line = part.map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2];
  };
  const back = light(getComputedStyle(document.body).backgroundColor), faint = [];
  for (const one of document.querySelectorAll("h1, h2, h3, p, li, td, th, figcaption, small, summary, text, .tile span")) {
    const style = getComputedStyle(one), fore = light(one.tagName === "text" ? style.fill : style.color);
    if ((Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05) < 4.5) faint.push(one.tagName + " " + one.textContent.slice(0, 40));
  }
  return faint;
}"""
# The smallest text as the screen shows it, in CSS pixels: a drawing's text shrinks with the drawing.
SMALLEST = """() => {
  const shown = [...document.querySelectorAll("svg text, td, th, li, figcaption, .tile span")].filter(one => one.getClientRects().length);
  return Math.min(...shown.map(one => parseFloat(getComputedStyle(one).fontSize) * (one.tagName === "text" ? one.getScreenCTM().a : 1)));
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A single run; a comparison of three seeds; many runs with hostile names, one of them in progress."""
    root = tmp_path_factory.mktemp("pages")
    made.write_run(root / "single", "dad", "dad")
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
def test_on_screen(browser, pages, name, width, scheme):
    shown, said = _open(
        browser, pages[name], viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    assert said == []
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
def test_in_print(browser, pages, name):
    """On A4 as printed: black on white whatever the screen's scheme, nothing hidden in a box that scrolls."""
    shown, said = _open(
        browser, pages[name], viewport={"width": 703, "height": 1000}, color_scheme="dark"
    )  # A4 without its margins
    shown.emulate_media(media="print")
    assert (
        said == []
        and shown.evaluate("getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert shown.evaluate(FAINT) == []
    hidden = "[...document.querySelectorAll('.scroll')].filter(one => getComputedStyle(one).overflowX !== 'visible').length"
    assert shown.evaluate(hidden) == 0
    if name != "hostile":  # twelve columns of endless words are wider than paper
        assert (
            shown.evaluate(
                "Math.max(...[...document.querySelectorAll('table')].map(one => one.getBoundingClientRect().right))"
            )
            <= 703
        )
    assert shown.pdf(format="A4")[:5] == b"%PDF-"
    shown.context.close()


def test_by_keyboard(browser, pages):
    """What scrolls by itself and what is folded away can be reached with the tab key."""
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
    """(page, what went wrong in it): console messages, errors, and requests for anything but the page itself."""
    shown = browser.new_context(**options).new_page()
    said: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("dialog", lambda dialog: said.append(dialog.message))
    shown.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:")) else said.append(request.url)
        ),
    )
    shown.goto(path.as_uri())
    return shown, said
