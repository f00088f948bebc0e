"""Measure images without labels: 500 labelled digits, alone and with 3,000 further images.

    python scripts/unlabelled.py -o runs/unlabelled [--record docs/records/unlabelled.json]

Writes the embedded digits as image folders, trains by CE and DAD on the labelled ones and by DAD on
both, each for the same number of steps and with three seeds, and keeps the results as one line of
JSON. About a minute a run on a CPU core. The embedded teacher was trained on these digits, so its
predictions on the further ones are better than those on images that are new to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a bare checkout too

from dad_fast.cli.main import main as dad_fast
from dad_fast.data.sources.registry import open_source

LABELLED = 50  # of each class
SETTINGS = """\
extends = "demo"
seeds = 3

[data]
data_dir = '{folder}/data'
class_map = '{folder}/classes.csv'

[eval]
every_epochs = 0
suites = ["test", "optdigits", "contrast"]

# 210 steps each: 42 epochs of 500 images, 6 of 3,500.
[variants.ce-500]
method = "ce"
schedule.epochs = 42

[variants.dad-500]
method = "dad"
schedule.epochs = 42

[variants.dad-500-extra]
method = "dad"
schedule.epochs = 6
data.extra_data = '{folder}/extra'
"""


def write_digits(folder: Path) -> None:
    """Write data/train, data/val, data/test, data/optdigits, extra/ and classes.csv."""
    for split in ("train", "val", "test", "optdigits"):
        source = open_source("embedded:digits", split)
        written: Counter[int] = Counter()
        for index, label in enumerate(source.labels.tolist()):
            written[label] += 1
            target = folder / "data" / split / str(label)
            if split == "train" and written[label] > LABELLED:
                target = folder / "extra"
            target.mkdir(parents=True, exist_ok=True)
            source.read(index).save(target / f"{index:05d}.png")
    rows = [f"{number},{name},{text}" for number, name, text in source.classes]
    (folder / "classes.csv").write_text("\n".join(["id,folder,name", *rows]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="labelled digits with and without further images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--record", type=Path, help="where to keep the results")
    given = parser.parse_args()
    given.output.mkdir(parents=True)
    write_digits(given.output)
    file = given.output / "unlabelled.toml"
    file.write_text(SETTINGS.format(folder=given.output))
    runs = given.output / "runs"
    code = dad_fast(["train", str(file), "--jobs", "1", "-o", str(runs)])
    if code == 0 and given.record:
        given.record.write_text(json.dumps(json.loads((runs / "results.json").read_text())) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
