"""Make dad_fast/evaluation/public_models.json from timm's published results.

    python scripts/timm_results.py CHECKOUT COMMIT VERSION

CHECKOUT is a folder with the results-*.csv of huggingface/pytorch-image-models (its results/), of
COMMIT and VERSION of timm. Kept: top-1 by test set, parameters, image size.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from dad_fast.files import atomic_write_text

OUTPUT = Path(__file__).parents[1] / "dad_fast" / "evaluation" / "public_models.json"
FILES = {
    "imagenet": "results-imagenet.csv",
    "imagenet-v2": "results-imagenetv2-matched-frequency.csv",
    "imagenet-a": "results-imagenet-a.csv",
    "imagenet-r": "results-imagenet-r.csv",
    "imagenet-sketch": "results-sketch.csv",
}


def main(folder: Path, commit: str, version: str) -> None:
    tables = {}
    for suite, name in FILES.items():
        with open(folder / name, encoding="utf-8", newline="") as file:
            # A model may stand there at several image sizes.
            tables[suite] = {(row["model"], row["img_size"]): row for row in csv.DictReader(file)}
    rows = []
    for key, row in tables["imagenet"].items():
        millions = float(row["param_count"].replace(",", ""))
        found = [tables[suite].get(key) for suite in FILES]
        top1 = [None if one is None else float(one["top1"]) for one in found]
        rows.append([row["model"], millions, int(row["img_size"]), *top1])
    about = {
        "source": "https://github.com/huggingface/pytorch-image-models, results/",
        "commit": commit,
        "version": f"timm {version}",
        "licence": "Apache-2.0",
        "columns": ["model", "million_parameters", "img_size", *FILES],
    }
    head = json.dumps(about, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    atomic_write_text(OUTPUT, f'{head},\n "rows": [\n{lines}\n]}}\n')
    print(f"{OUTPUT}: {len({row[0] for row in rows}):,} models, {len(rows):,} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
