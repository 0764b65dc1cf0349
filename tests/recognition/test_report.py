"""Accuracies and tables against numbers counted by hand."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from common.charts import as_label
from dataset import DatasetInfo
from recognition import report
from tests.support import ODD_NAMES

GROUPS = {"head": [0], "middle": [2], "tail": [1, 3]}
INFO = DatasetInfo(Path(), "hand", ["a", "b", "c", "d"], GROUPS, "by hand", Path())
CONFUSION = torch.tensor([[8, 1, 1, 0], [1, 1, 0, 0], [0, 0, 3, 1], [2, 0, 0, 2]])


def results_of(classes=(0, 1, 2, 3), confusion=CONFUSION):
    return {"dataset": "hand", "stage": "student", "selected_on": "val", "parameters": 23_500_000, "flops": 8.02e9,
            "ms_per_image": 6.8, "ms_per_image_batch": 8, "image_size": 224, "precision": "fp32", "device": "cpu",
            "confusion": confusion.tolist(), **report.accuracies(confusion, INFO, list(classes), [90, 4, 30, 7])}


def test_accuracies_by_hand():
    found = results_of()
    assert found["images"] == 20 and found["overall"] == 14 / 20
    assert (found["head"], found["middle"], found["tail"]) == (8 / 10, 3 / 4, 3 / 6)
    assert found["tail_class_mean"] == (1 / 2 + 2 / 4) / 2
    assert found["mean_per_class"] == pytest.approx((0.8 + 0.5 + 0.75 + 0.5) / 4)
    assert found["per_class"][3] == {"id": 3, "name": "d", "group": "tail", "train": 7, "test": 4, "accuracy": 0.5}


def test_image_weighted_and_class_mean_differ_where_classes_do():
    confusion = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 9]])
    found = report.accuracies(confusion, INFO, [0, 1, 2, 3], [1, 1, 1, 1])
    assert found["tail"] == 9 / 10 and found["tail_class_mean"] == (0 + 1) / 2


def test_a_teacher_is_judged_on_its_own_classes_and_other_groups_are_absent():
    found = results_of(classes=[1, 3])
    assert found["images"] == 6 and found["overall"] == found["tail"] == 3 / 6
    assert found["head"] is None and found["middle_class_mean"] is None
    assert "head -   middle -   tail 50.00" in report.results_table(found)


def test_a_class_without_test_images_does_not_count():
    confusion = CONFUSION.clone()
    confusion[1] = 0
    found = results_of(confusion=confusion)
    assert found["per_class"][1]["accuracy"] is None
    assert found["tail_class_mean"] == 0.5 and found["mean_per_class"] == pytest.approx((0.8 + 0.75 + 0.5) / 3)


def test_published_student_is_reproduced_from_its_counts():
    # 23 classes are not needed for the sums: 345/392 head, 202/220 middle, 185/213 tail give the published figures.
    confusion = torch.diag(torch.tensor([345, 185, 202, 0]))
    confusion[0, 1], confusion[1, 0], confusion[2, 0] = 392 - 345, 213 - 185, 220 - 202
    found = report.accuracies(confusion, INFO, [0, 1, 2, 3], [1] * 4)
    assert [round(100 * found[key], 2) for key in ("overall", "head", "middle", "tail")] == [88.73, 88.01, 91.82, 86.85]


def test_text_in_the_authors_form():
    assert report.authors_text(results_of()) == (
        "0:0.8\n1:0.5\n2:0.75\n3:0.5\naverage_acc:0.7\nhead_ave:0.8\nmiddle_ave:0.75\ntail_ave:0.5\ntest_image_all:20\n")


def test_the_table_names_every_class_and_the_protocol():
    table = report.results_table(results_of())
    assert all(name in table for name in ("tail", "70.00", "75.00", "23.50 M", "8.02 GFLOP", "held-out part of train"))
    assert "TEST part (the authors' protocol)" in report.results_table({**results_of(), "selected_on": "test"})


def test_files_of_a_test(tmp_path, capsys):
    report.write_results(tmp_path, results_of())
    assert json.loads((tmp_path / "results.json").read_text())["overall"] == 0.7
    assert (tmp_path / "results.txt").read_text().endswith("test_image_all:20\n")
    assert "70.00" in capsys.readouterr().out


def size_of(path):
    """(width, height) of a PNG in pixels."""
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("names", ODD_NAMES)
def test_class_names_are_drawn_as_they_are(tmp_path, names, recwarn, capsys):
    results = results_of()
    results = {**results, "dataset": names[0], "per_class": [
        {**row, "name": name} for row, name in zip(results["per_class"], names, strict=True)]}
    report.draw_confusion(results, tmp_path / "confusion.png")
    report.draw_comparison({"baseline": [results]}, tmp_path / "comparison.png")
    report.draw_class_counts(dataclasses.replace(INFO, name=names[0], classes=names),
                             {"train": [90, 4, 30, 7], "val": [0] * 4}, tmp_path / "class_counts.png")
    assert size_of(tmp_path / "confusion.png") == (550, 550) and not [w for w in recwarn if "Glyph" in str(w.message)]
    missing = any("船" in name for name in names)
    assert capsys.readouterr().out == "".join(
        f"note: {tmp_path / name}.png: the font lacks letters of some names, which are drawn as boxes\n"
        for name in ("confusion", "comparison", "class_counts") if missing)


@pytest.mark.parametrize("name", ["plain", "$a$", r"\$", r"\\$x$", "a$b", "_$_", "$$"])
def test_a_label_is_never_a_formula(name):
    text = Text(text=as_label(name))
    assert text._preprocess_math(text.get_text()) == (name, False)


def test_long_names_are_cut_to_columns():
    assert as_label("destroyer", 9) == "destroyer" and as_label("destroyer", 8) == "destroy…"
    assert as_label("驱逐舰", 6) == "驱逐舰" and as_label("驱逐舰", 5) == "驱逐…" and as_label("") == ""


def test_a_confusion_matrix_of_many_classes_is_of_bounded_size(tmp_path):
    classes = [str(number) for number in range(130)]
    info = dataclasses.replace(INFO, classes=classes, groups={"head": list(range(130)), "middle": [], "tail": []})
    confusion = torch.ones(130, 130, dtype=torch.int64)
    results = {**results_of(), "confusion": confusion.tolist(),
               **report.accuracies(confusion, info, list(range(130)), [1] * 130)}
    report.draw_confusion(results, tmp_path / "confusion.png")
    assert size_of(tmp_path / "confusion.png") == (4400, 4400)


def test_other_pictures_of_many_classes_are_of_bounded_size(tmp_path, monkeypatch):
    """1,000 bars would be 39,820 pixels wide; matplotlib draws 65,535 at most."""
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    ids = list(range(1000))
    info = dataclasses.replace(INFO, classes=list(map(str, ids)), groups={"head": ids, "middle": [], "tail": []})
    report.draw_class_counts(info, {"train": ids, "val": ids}, tmp_path / "class_counts.png")
    assert figures[0].get_size_inches().tolist() == [40, 4] and len(figures[0].axes[0].get_xticklabels()) == 334


@pytest.mark.parametrize("count, named, size", [(1, 1, 7), (23, 23, 7), (400, 400, 5), (401, 201, 7), (1000, 334, 6)])
def test_of_very_many_classes_some_are_named(count, named, size):
    positions, points = report.named_classes(count)
    assert len(positions) == named and points == pytest.approx(size, abs=0.05) and 0 <= positions[-1] < count


def test_comparison_is_mean_and_sample_deviation():
    runs = {"baseline": [{**results_of(), "overall": value} for value in (0.5, 0.6, 0.8)],
            "T2FTS student": [{**results_of(), "overall": value} for value in (0.9, 0.9, 0.9)]}
    table = report.comparison(runs)
    mean, deviation, values = table["baseline"]["overall"]
    assert mean == pytest.approx(1.9 / 3) and deviation == pytest.approx(statistics.stdev([0.5, 0.6, 0.8]))
    assert math.isclose(deviation, math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
    text = report.comparison_table(table)
    assert "63.3 ± 15.3" in text and "90.0 ± 0.0" in text
    assert "±" not in report.comparison_table(report.comparison({"a": [results_of()]}))


def test_differences_are_taken_seed_by_seed():
    table = report.comparison({
        "student": [{**results_of(), "overall": value, "tail": None} for value in (0.5, 0.7, 0.9)],
        "rival": [{**results_of(), "overall": value} for value in (0.4, 0.7, 0.7)]})
    differences = report.paired_differences(table["student"], table["rival"])
    mean, deviation, values = differences["overall"]
    assert values == pytest.approx([0.1, 0, 0.2]) and mean == pytest.approx(0.1) and deviation == pytest.approx(0.1)
    assert "tail" not in differences and differences["head"] == (0, 0, [0, 0, 0])
    assert report.paired_line(differences, 3) == "class mean +0.0 ± 0.0, overall +10.0 ± 10.0"
    assert report.paired_line(differences, 1) == "class mean +0.0, overall +10.0"


def test_pictures_are_drawn(tmp_path):
    for rows in (["baseline", "student"], ["baseline", "rival", "student"]):
        report.draw_comparison({row: [results_of()] for row in rows}, tmp_path / "comparison.png")
    with open(tmp_path / "log.jsonl", "w") as log:
        for epoch in (1, 2):
            log.write(json.dumps({"epoch": epoch, "loss": 2.0, "cross_entropy": 1.0, "mse_own": 1.0, "lr": 0.1,
                                  "val_accuracy": 0.5, "seconds": 1, "images_per_second": 9}) + "\n")
    report.draw_curves(tmp_path)
    for name in ("comparison.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 5000
