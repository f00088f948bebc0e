"""The HTML report: whole, self-contained, escaped, and its charts true to the numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from dad_fast.errors import DataError
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.observe.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Bar, Series, bar_chart, line_chart, ticks
from dad_fast.observe.report import write_report
from dad_fast.observe.runlog import RunLog
from dad_fast.observe.sheet import write_sheet

NASTY = "<b>&\"'kd"


class Checker(HTMLParser):
    """Every tag is closed; nothing is loaded from anywhere."""

    VOID = {"meta", "link", "img", "line", "rect", "circle", "polyline", "path", "wbr"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert tag != "script"
        assert all(value.startswith("data:") for name, value in attrs if name in ("src", "href"))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def result(top1: float) -> dict:
    return {"name": "s", "num_images": 100, "top1": top1, "top5": None, "ece": 2.5, "nll": 0.5, "skipped": 0, "by_severity": []}


def run(variant: str, seed: int, top1: float) -> dict:
    teacher = {"name": "T<1>", "seen": "a & b", "suites": {"test": result(99.0), "fog": result(88.0)}}
    numbers = {"epochs": 2.0, "steps": 20, "seconds": 12.4, "bad_images": 0}
    suites = {"test": result(top1), "fog": result(top1 - 20)}
    return {"variant": variant, "method": "kd", "seed": seed, **numbers, "suites": suites, "teacher": teacher}


def fill(folder, with_nan=False) -> None:
    with RunLog(folder) as log:
        for step in range(1, 5):
            loss = float("nan") if with_nan and step == 2 else 1.0 / step
            log.metrics("train", step=step, epoch=step / 2, loss=loss, kept=0.75, img_per_s=1234.0, data_wait=0.25)
        log.metrics("val", step=4, epoch=2, top1=91.5, nll=0.3, ece=1.0)
    image = torch.rand(2, 3, 28, 28)
    write_sheet(folder / "sheet.png", image, image, image.flip(3), ["one", "two"])


def test_comparison(tmp_path):
    runs = []
    for variant, top1 in (("dad", 95.0), (NASTY, 90.0)):
        for seed in range(2):
            if variant == "dad":
                fill(tmp_path / variant / f"seed-{seed}", with_nan=True)
            runs.append(run(variant, seed, top1 + seed))
    facts = {"python": "3.11", "cpu": "<cpu>", "threads": 2, "gpus": []}
    atomic_write_json(tmp_path / "results.json", {"config": "method = '<x>'", "environment": facts, "runs": runs})
    path = write_report(tmp_path)
    page = path.read_text()
    checked = Checker(page)
    assert path == tmp_path / "report.html" and not re.search(r"https?://|url\(", page) and "prefers-color-scheme: dark" in page
    for words in ("95.5 ± 0.7", "70.5 ± 0.7", NASTY, "teacher T<1>", "a & b", "method = '<x>'", "<cpu>", "1,234", "25.0"):
        assert words in checked.text, words
    figures = re.findall(r"<figcaption>(.*?) <small>", page)
    assert figures[:2] == ["test", "fog"]  # a bar chart per suite
    assert figures[2:5] == ["Validation top-1", "Training loss", "Attacked images kept by the filter"]
    training = page.split("Training</h2>")[1].split("Throughput, energy and overhead</h2>")[0]
    assert checked.tags.count("img") == 1 and training.count("<polyline") == 4
    assert "nan" not in re.sub(r'src="data:[^"]*"', "", training)  # a picture's base64 may well hold these letters


def test_single_run(tmp_path):
    fill(tmp_path)
    atomic_write_json(tmp_path / "results.json", run("kd", 0, 90.0))
    atomic_write_text(tmp_path / "config.toml", "method = 'kd'\n")
    atomic_write_json(tmp_path / "run.json", {"torch": "2.15"})
    checked = Checker(write_report(tmp_path).read_text())
    assert "One seed shows no spread" in checked.text and "method = 'kd'" in checked.text and '"torch": "2.15"' in checked.text
    assert "90.0" in checked.text and checked.tags.count("img") == 1


def test_run_without_log_or_sheet(tmp_path):
    atomic_write_json(tmp_path / "results.json", run("kd", 0, 90.0))
    checked = Checker(write_report(tmp_path).read_text())
    assert "Training" not in checked.text and "img" not in checked.tags


def test_unfinished_run(tmp_path):
    with pytest.raises(DataError, match="no run has written to it"):
        write_report(tmp_path)
    fill(tmp_path)
    with pytest.raises(DataError, match="results.json: not a results.json of a finished run; .*in progress"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (93.2, 99.1, [93, 94, 95, 96, 97, 98, 99, 100]),
        (0.001, 0.0042, [0.001, 0.002, 0.003, 0.004, 0.005]),
        (5, 5, [4.4, 4.6, 4.8, 5, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks(low, high, expected):
    found = ticks(low, high)
    assert found == pytest.approx(expected) and found[0] <= low and found[-1] >= high


def test_points_and_bars_are_drawn_to_scale():
    chart = line_chart("loss", "nats", "epoch", [Series("kd", "red", [(0, 0), (5, 50), (10, 100)]), Series("dad", "blue", [])])
    points = re.search(r'points="([^"]+)"', chart).group(1).split()
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    assert [tuple(map(float, point.split(","))) for point in points] == [
        (LEFT, HEIGHT - BOTTOM), (LEFT + width / 2, HEIGHT - BOTTOM - height / 2), (LEFT + width, TOP)
    ]  # fmt: skip
    bars = [Bar("a", 100.0, None, "red"), Bar("b", 50.0, (45.0, 56.0), "blue", [40.0, 60.0]), Bar("c", float("nan"), None, "red")]
    chart = bar_chart("test", "top-1, %", bars)
    widths = [float(value) for value in re.findall(r'<rect[^>]* width="([\d.]+)"', chart)]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1) and widths[2] == 0 and "50.0 [45.0, 56.0]" in chart
    low, high = re.search(r'<path d="M([\d.]+) [\d.]+H([\d.]+)', chart).groups()
    assert float(high) - float(low) == pytest.approx(widths[0] * 0.11, abs=0.2)
    seeds = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)]
    assert seeds[1] - seeds[0] == pytest.approx(widths[0] * 0.2, abs=0.2)
