"""The HTML report: self-contained, escaped, and charts to scale."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import report_runs as made

from dad_fast.cli import main as cli
from dad_fast.errors import DataError
from dad_fast.files import atomic_write_json, atomic_write_text
from dad_fast.loggers.run_log import RunLog
from dad_fast.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Bar,
    Series,
    bar_chart,
    line_chart,
    ticks,
)
from dad_fast.report.cost import joules_per_image, throughput
from dad_fast.report.intervals import over_seeds, wilson
from dad_fast.report.page import page, write_report
from dad_fast.report.runs import load
from dad_fast.report.tiles import PAGE_BYTES, Tiles, heat_map

NASTY = "<b>&\"'kd"


class Checker(HTMLParser):
    """Check that every tag is closed and nothing is loaded."""

    VOID = frozenset({"meta", "link", "img", "line", "rect", "circle", "polyline", "path", "wbr"})

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
        assert all(
            value.startswith("data:")
            for name, value in attrs
            if name == "src" or (name == "href" and not value.startswith("#"))
        )
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
    return {
        "name": "s",
        "num_images": 100,
        "top1": top1,
        "top5": None,
        "ece": 2.5,
        "nll": 0.5,
        "skipped": 0,
        "by_severity": [],
    }


def run(variant: str, seed: int, top1: float) -> dict:
    teacher = {
        "name": "T<1>",
        "seen": "a & b",
        "suites": {"test": result(99.0), "fog": result(88.0)},
    }
    numbers = {"epochs": 2.0, "steps": 20, "seconds": 12.4, "bad_images": 0}
    suites = {"test": result(top1), "fog": result(top1 - 20)}
    return {
        "variant": variant,
        "method": "kd",
        "seed": seed,
        **numbers,
        "suites": suites,
        "teacher": teacher,
    }


def fill(folder, with_nan=False) -> None:
    with RunLog(folder) as log:
        for step in range(1, 5):
            loss = float("nan") if with_nan and step == 2 else 1.0 / step
            log.metrics(
                "train",
                step=step,
                epoch=step / 2,
                loss=loss,
                kept=0.75,
                img_per_s=1234.0,
                data_wait=0.25,
            )
        log.metrics("val", step=4, epoch=2, top1=91.5, nll=0.3, ece=1.0)
    made.write_images(folder)


def test_report_of_a_comparison_is_self_contained(tmp_path):
    runs = []
    for variant, top1 in (("dad", 95.0), (NASTY, 90.0)):
        for seed in range(2):
            if variant == "dad":
                fill(tmp_path / variant / f"seed-{seed}", with_nan=True)
            runs.append(run(variant, seed, top1 + seed))
    facts = {"python": "3.11", "cpu": "<cpu>", "threads": 2, "gpus": []}
    atomic_write_json(
        tmp_path / "results.json", {"config": "method = '<x>'", "environment": facts, "runs": runs}
    )
    path = write_report(tmp_path)
    text = path.read_text()
    checked = Checker(text)
    assert path == tmp_path / "report.html"
    assert not re.search(r"https?://|url\(", text)
    assert "prefers-color-scheme: dark" in text
    for words in (
        "95.5 ± 0.7",
        "70.5 ± 0.7",
        NASTY,
        "teacher T<1>",
        "a & b",
        "method = '<x>'",
        "<cpu>",
        "1,234",
        "25.0",
    ):
        assert words in checked.text, words
    figures = re.findall(r"<figcaption>(.*?) <small>", text)
    assert figures[:2] == ["test", "fog"]  # a bar chart per suite
    assert figures[2:6] == [
        "Validation top-1",
        "Training loss",
        "Validation loss",
        "Attacked images kept by the filter",
    ]
    training = text.split("Training</h2>")[1].split("Throughput, energy and overhead</h2>")[0]
    assert checked.tags.count("img") == 10 and training.count("<polyline") == 4
    # The base64 of a picture may contain these letters.
    assert "nan" not in re.sub(r'src="data:[^"]*"', "", training)


def test_single_run(tmp_path):
    fill(tmp_path)
    atomic_write_json(tmp_path / "results.json", run("kd", 0, 90.0))
    atomic_write_text(tmp_path / "config.toml", "method = 'kd'\n")
    atomic_write_json(tmp_path / "run.json", {"torch": "2.15"})
    checked = Checker(write_report(tmp_path).read_text())
    assert "One seed shows no spread" in checked.text
    assert "method = 'kd'" in checked.text
    assert '"torch": "2.15"' in checked.text
    assert "90.0" in checked.text and checked.tags.count("img") == 10


def test_run_without_log_or_sheet(tmp_path):
    atomic_write_json(tmp_path / "results.json", run("kd", 0, 90.0))
    checked = Checker(write_report(tmp_path).read_text())
    assert "Training" not in checked.text and "img" not in checked.tags


def test_unfinished_run(tmp_path):
    with pytest.raises(DataError, match="no run has written to it"):
        write_report(tmp_path)
    fill(tmp_path)
    with pytest.raises(
        DataError, match="results.json: not a results.json of a finished run; .*in progress"
    ):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (93.2, 99.1, [93, 94, 95, 96, 97, 98, 99, 100]),
        (0.001, 0.0042, [0.001, 0.002, 0.003, 0.004, 0.005]),
        (5, 5, [4.4, 4.6, 4.8, 5, 5.2, 5.4, 5.6]),
        (0, 3e-41, [0, 0.5e-41, 1e-41, 1.5e-41, 2e-41, 2.5e-41, 3e-41]),
    ],
)
def test_ticks(low, high, expected):
    found = ticks(low, high)
    assert found == pytest.approx(expected, abs=0) and found[0] <= low and found[-1] >= high


LARGEST = sys.float_info.max / 2


@pytest.mark.parametrize("most", [4, 6])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 5e-324),
        (1e-41, 1e-41),
        (1e-13, 3e-13),
        (1.0, 1.0 + 2e-16),
        (1e20, 1e20),
        (-LARGEST, LARGEST),
        (LARGEST, LARGEST),
    ],
)
def test_ticks_of_any_range_differ_and_span_it(low, high, most):
    found = ticks(low, high, most)
    assert all(a < b for a, b in itertools.pairwise(found)) and 2 <= len(found) <= most + 3
    assert found[0] <= low + 1e-9 * abs(low) and found[-1] >= high - 1e-9 * abs(high)


def test_a_chart_of_tiny_losses_is_drawn():
    chart = line_chart("loss", "nats", "epoch", [Series("kd", "red", [(0, 1e-41), (5, 3e-41)])])
    assert "nan" not in chart and chart.count("<polyline") == 1


def test_points_and_bars_are_drawn_to_scale():
    chart = line_chart(
        "loss",
        "nats",
        "epoch",
        [Series("kd", "red", [(0, 0), (5, 50), (10, 100)]), Series("dad", "blue", [])],
    )
    points = re.search(r'points="([^"]+)"', chart).group(1).split()
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    assert [tuple(map(float, point.split(","))) for point in points] == [
        (LEFT, HEIGHT - BOTTOM),
        (LEFT + width / 2, HEIGHT - BOTTOM - height / 2),
        (LEFT + width, TOP),
    ]
    bars = [
        Bar("a", 100.0, None, "red"),
        Bar("b", 50.0, (45.0, 56.0), "blue", [40.0, 60.0]),
        Bar("c", float("nan"), None, "red"),
    ]
    chart = bar_chart("test", "top-1, %", bars)
    widths = [float(value) for value in re.findall(r'<rect[^>]* width="([\d.]+)"', chart)]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1)
    assert widths[2] == 0
    assert "50.0 [45.0, 56.0]" in chart
    low, high = re.search(r'<path d="M([\d.]+) [\d.]+H([\d.]+)', chart).groups()
    assert float(high) - float(low) == pytest.approx(widths[0] * 0.11, abs=0.2)
    seeds = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)]
    assert seeds[1] - seeds[0] == pytest.approx(widths[0] * 0.2, abs=0.2)


def test_hostile_text_is_text(tmp_path):
    """Markup stays text; control and direction characters and half surrogates are written out."""
    folder = made.write_comparison(tmp_path / "x")
    for name in ("kd", "dad"):
        run = folder / name / "seed-0"
        record = json.loads((run / "results.json").read_text())
        record["suites"] = {made.HOSTILE: made.result(50.0) | {"protocol": made.HOSTILE}}
        record["teacher"] = {"name": made.HOSTILE, "seen": made.HOSTILE, "suites": record["suites"]}
        made.write_json(run / "results.json", record)
        made.write_json(
            run / "run.json",
            made.GPU | {"cpu": made.HOSTILE, "packages": {made.HOSTILE: made.HOSTILE}},
        )
    made.write_images(folder / "dad/seed-0", labels=(made.HOSTILE, made.HOSTILE))
    shown = page(load([folder / "kd/seed-0", folder / "dad/seed-0"]))
    checked = Checker(shown)
    assert "<script" not in shown and "script-src" not in shown and "default-src 'none'" in shown
    assert (
        "<script>alert(1)</script>\"'&amp;\\x1b[31m\\x00\\u202egnp.exe\\ud800 אבג" in checked.text
    )
    assert not any((ord(one) < 32 and one != "\n") or one in "\u202e\ud800" for one in shown)
    shown.encode()


def test_three_seeds_have_the_interval_of_their_mean(tmp_path):
    shown = page(load([made.write_comparison(tmp_path / "x", seeds=3)]))
    assert "96.0 [93.5, 98.5]" in shown  # 95, 96, 97: 4.303 / sqrt(3) around their mean
    assert "98.0 [96.5, 99.0]" in shown  # the teacher's: as recorded, over images
    assert "of the mean over seeds of the student (Student&#x27;s t)" in shown


def test_equal_runs_make_equal_pages(tmp_path):
    folder = made.write_comparison(tmp_path / "x", seeds=2)
    assert page(load([folder])) == page(load([folder]))


def test_two_seeds_have_the_interval_over_images(tmp_path):
    shown = page(load([made.write_comparison(tmp_path / "x", seeds=2)]))
    assert "95.5 [94.0, 96.5]" in shown
    assert "it does not cover other seeds" in shown
    assert "of the mean over seeds" not in shown


@pytest.mark.parametrize(("count", "percent"), [(1000, 97.6), (896, 10.0), (50, 0.0), (50, 100.0)])
def test_wilson_against_scipy(count, percent):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    hits = round(count * percent / 100)
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(100 * hits / count, count) == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=1e-6
    )


@pytest.mark.parametrize("count", [2, 3, 11, 12, 20, 101])
def test_t_against_scipy(count):
    stats = pytest.importorskip("scipy.stats")
    values = [50 + math.sin(i) for i in range(count)]
    mean, deviation = stats.tmean(values), stats.tstd(values)
    expected = stats.t.interval(0.95, count - 1, loc=mean, scale=deviation / math.sqrt(count))
    assert over_seeds(values) == pytest.approx(expected, rel=2e-5)


def test_report_names_fair_comparisons(tmp_path):
    folder = made.write_comparison(tmp_path / "x")
    shown = Checker(page(load([folder]))).text
    assert "At equal epochs, compare with kd: dad (4 times its time)." in shown
    assert "At equal time, compare with kd-long: dad (1 times its time)." in shown
    shown = Checker(page(load([folder / "kd/seed-0", folder / "dad/seed-0"]))).text
    assert (
        "No KD run here took as long as dad: part of a gain over KD may be longer training."
        in shown
    )


def test_only_differing_settings_are_listed(tmp_path):
    folder = made.write_comparison(tmp_path / "x", seeds=2)
    shown = page(load([folder])).split("What differs</h2>")[1].split("</section>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', shown) == ["method", "schedule.epochs"]
    assert re.findall(r"<td>(.*?)</td>", shown) == ["ce", "kd", "kd", "dad", "2", "2", "8", "2"]
    assert "What differs" not in page(load([folder / "kd/seed-0"]))


def test_cost_on_a_cpu(tmp_path):
    shown = (
        page(load([made.write_comparison(tmp_path / "x")]))
        .split("Throughput, energy and overhead</h2>")[1]
        .split("</section>")[0]
    )
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in shown.split("<tr>")[2:6]]
    assert [row[3] for row in cells] == ["0.80×", "1.00×", "1.00×", "4.00×"]
    assert cells[3][2] == "200"
    assert "No energy counters here" in shown
    assert "read the ratio, not the speed" in shown
    assert "J per image" not in shown


def test_energy_of_a_gpu(tmp_path):
    """600 W at 200 images a second are 3 J an image; 20 steps of 256 images are 15,360 J."""
    loaded = load([made.write_comparison(tmp_path / "x", facts=made.GPU, power=600.0)])
    shown = page(loaded).split("Throughput, energy and overhead</h2>")[1].split("</section>")[0]
    cells = re.findall(r"<td>(.*?)</td>", shown.split("<tr>")[5])
    assert cells[5:9] == ["3.0", "600", "3", "4.27"]
    assert "the GPU&#x27;s power, sampled at each log step" in shown
    assert "Power of the GPU <small>W" in shown and "read the ratio" not in shown


def test_energy_weighs_windows_by_their_images(tmp_path):
    with RunLog(tmp_path) as log:
        for step, rate, watts in ((10, 100.0, 200.0), (20, 50.0, 400.0), (30, 100.0, None)):
            log.metrics(
                "train",
                step=step,
                epoch=step,
                img_per_s=rate,
                **({"gpu": {"power_w": watts}} if watts else {}),
            )
    (run,) = load([tmp_path]).groups[0].runs
    assert throughput(run) == pytest.approx(30 / (10 / 100 + 10 / 50 + 10 / 100))
    assert joules_per_image(run) == pytest.approx((200 / 100 + (200 + 400) / 2 / 50) / 2)


def test_energy_of_several_gpus(tmp_path):
    """The first GPU's power is used for all; a step's images are those of all processes."""
    settings = {"data.global_batch_size": 1024}
    made.write_run(
        tmp_path, facts=made.GPU | {"processes": 4}, power=500.0, rate=2000.0, settings=settings
    )
    shown = (
        page(load([tmp_path]))
        .split("Throughput, energy and overhead</h2>")[1]
        .split("</section>")[0]
    )
    cells = re.findall(r"<td>(.*?)</td>", shown.split("<tr>")[2])
    assert cells[6:9] == ["500", "1", f"{20 * 1024 / 3600:.3g}"]
    assert "used for each of them" in shown


def test_kd_of_another_machine_or_student_is_no_baseline(tmp_path):
    for number, more in enumerate(
        (
            {"facts": made.GPU},
            {"settings": {"data.batch_size": 7}},
            {"settings": {"store.dirs": ("s",)}},
        )
    ):
        made.write_run(tmp_path / f"{number}/kd/seed-0", **more)
        made.write_run(tmp_path / f"{number}/dad/seed-0", "dad", "dad")
        assert "No time relative to KD" in page(load([tmp_path / f"{number}"]))


def test_calibration_pools_seeds_and_needs_sound_bins(tmp_path):
    folder = made.write_comparison(tmp_path / "x", seeds=2)
    shown = page(load([folder]))
    tooltip = "18.2 % of images, confidence 96.7 %, accuracy 87.0 %"
    assert shown.split("Calibration</h2>")[1].count(tooltip) == 3 * 5
    run = folder / "dad/seed-0"
    record = json.loads((run / "results.json").read_text())
    for broken in (
        None,
        3,
        {"count": [1]},
        {"count": [1, 2], "confidence": [0.1], "accuracy": [1, 2]},
        {"count": ["x"]},
    ):
        for result in record["suites"].values():
            result["reliability"] = broken
        made.write_json(run / "results.json", record)
        assert "dad: " not in page(load([run])).split("Calibration</h2>")[1].split("</section>")[0]


def test_further_metrics_and_detection(tmp_path):
    record = made.write_run(tmp_path)
    record["ood"] = {
        "textures": {"energy": {"auroc": 91.25, "aupr": 90.0, "fpr95": 30.0}},
        "broken": 3,
    }
    made.write_json(tmp_path / "results.json", record)
    shown = page(load([tmp_path]))
    for words in (
        "Brier score, 0 to 2",
        "0.120",
        "Agreement with the teacher in %",
        "91.2",
        "resize 28, no mask",
        "textures",
    ):
        assert words in shown, words
    assert "Top-5" not in shown


def test_evaluation_file_is_a_column_next_to_a_run(tmp_path):
    """A file of `dad-fast eval --json` is a column of results without curves or cost."""
    made.write_run(tmp_path / "run")
    model = {"path": "m", "method": "dad", "suites": {"test": made.result(77.7)}}
    made.write_json(
        tmp_path / "scores.json",
        {"data_dir": "d", "checkpoint": model, "teacher": None, "environment": made.CPU},
    )
    shown = page(load([tmp_path / "run", tmp_path / "scores.json"]))
    assert "77.7" in shown and ">scores<" in shown and "nan" not in Checker(shown).text
    both = {"models": {"a": model, "b": model}, "data_dir": "d"}
    made.write_json(tmp_path / "scores.json", both)
    assert [group.label for group in load([tmp_path / "scores.json"]).groups] == ["a", "b"]


def test_heat_map_colours_changed_codes():
    image = np.full((8, 12, 3), 100, np.uint8)
    shift = np.zeros((2, 3), np.float32)
    shift[0, 1], shift[1, 2] = 1.0, 0.5
    shown = heat_map(image, shift, 1.0)
    assert (shown[:4, :4] == 90).all() and (shown[4:, :8] == 90).all()  # unchanged: dim and grey
    far, near = shown[:4, 4:8], shown[4:, 8:]
    assert (far == far[0, 0]).all()
    assert (near == near[0, 0]).all()
    assert far[0, 0, 0] > near[0, 0, 0] > 150
    assert far[0, 0, 1] > near[0, 0, 1]


def test_photographs_are_small_and_digits_exact(tmp_path):
    made.write_images(tmp_path, side=28)
    digits = Tiles(1).sheet(tmp_path, [])
    assert digits.count("data:image/png") == 10
    assert digits.count("class=small") == 10
    assert "difference ×5" in digits
    assert "7 × 7 codes an image out of 256, 8 bits each: 49 bytes." in digits
    made.write_images(tmp_path, side=224, codes=0)
    photographs = Tiles(1).sheet(tmp_path, [])
    assert photographs.count("data:image/jpeg") == 8 and "changed codes" not in photographs
    made.write_images(tmp_path, labels=tuple("abcdefgh"), side=224)
    few = Tiles(20).sheet(tmp_path, [])
    assert len(few) < 4 / 3 * PAGE_BYTES / 20 + 250_000 and "of 8 examples are shown" in few


def test_page_of_twenty_runs_is_small(tmp_path):
    made.write_run(tmp_path / "run-0", "dad", "dad")
    made.write_log(tmp_path / "run-0", steps=2000)
    made.write_images(tmp_path / "run-0", labels=tuple("abcdefgh"), side=224)
    for number in range(1, 20):
        shutil.copytree(tmp_path / "run-0", tmp_path / f"run-{number}")
    shown = page(load(sorted(tmp_path.iterdir())))
    assert len(shown) < 5_000_000
    assert shown.count("<h3>") == 20


def test_help_fits_a_screen(capsys):
    assert cli.main(["report", "-h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: dad-fast report")
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
