"""Tables of `dad-fast eval` fit the terminal."""

import pytest

from dad_fast.evaluation import show
from dad_fast.evaluation.columns import Layout
from dad_fast.evaluation.metrics.ood_detection import METRICS

FOUND = {"suite": "a_suite_of_a_long_name_of_more_than_24_letters", "top-1 %": "12.3"}


@pytest.mark.parametrize("width", [1000, 93, 80, 60, 40, 24])
def test_results_fit_the_terminal(width):
    layout = show.results_layout(width, with_teacher=True)
    assert len(layout.header()) <= width
    cells = {**dict.fromkeys(show.WIDTHS, "1.0"), **FOUND}
    cells["suite"] = cells["suite"][:24]
    line = layout.line(cells)
    assert len(line) <= width and "12.3" in line
    assert (layout.left_out == []) == (width >= 93)
    assert ("Brier" in layout.note()) == (width < 93)


def test_agreement_is_a_column_next_to_a_teacher_alone():
    with_teacher, alone = (show.results_layout(1000, with_teacher=known) for known in (True, False))
    assert with_teacher.header() == f"{alone.header()} agree %"
    assert not alone.left_out


def test_long_names_are_whole_where_there_is_room():
    wide, narrow = Layout({"suite": 24, "x": 5}, (), 100), Layout({"suite": 24, "x": 5}, (), 20)
    cells = {"suite": "gaussian_noise_of_another_kind", "x": "1"}
    assert wide.line(cells).startswith("gaussian_noise_of_another_kind ")
    assert narrow.line(cells) == "gaussian_nois…     1" and len(narrow.line(cells)) == 20


def test_other_tables_fit_80_columns():
    scores = {"energy": dict.fromkeys(METRICS, 50.0)}
    lines = show.detection_lines("val", {"textures": scores}, 80)
    assert max(map(len, lines)) <= 80 and "AUROC" in lines[0]
    one = {
        "top1": (50.0, 60.0),
        "interval": (-12.0, -8.0),
        "num_images": 50_000,
        "difference": -10.0,
        "only_first": 1,
        "only_second": 2,
        "p_value": 0.5,
        "non_finite": 0,
    }
    table = show.comparison_lines(("a", "b"), {"imagenet-sketch": one}, 80)[3:-1]
    assert max(map(len, table)) <= 80 and "-10.0" in table[1]
