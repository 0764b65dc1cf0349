"""DOTA's AP against cases by hand and a slow reference, submission files, and the script that evaluates them."""

import json
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch

from common.dota import read_label_file
from common.runtime import UserError
from detection import evaluate_dota, train_gfl
from detection.data.records import Annotations, Record
from detection.data.submissions import read_submission, write_submission
from detection.geometry.oriented import corners, minimum_area_rectangle
from detection.metrics.dota_ap import dota_ap, overlap, released_mean
from tests.support import QUICK_DETECTOR, error_line, real, run_detector, run_program, write_dota
from tests.support import run_tool as run

SQUARE = np.array([0.0, 0, 10, 0, 10, 10, 0, 10])  # points


def shifted(*shifts):
    """Squares moved to the right: an IoU with the square of (10 - shift) / (10 + shift)."""
    return np.stack([SQUARE + np.array([shift, 0] * 4) for shift in shifts])


def truth(boxes, labels=None, difficult=None, classes=("ship",)):
    """Annotations of one image."""
    count = len(boxes)
    return Annotations(list(classes), [Record(
        Path("a.png"), 100, 100, np.asarray(boxes), np.zeros(count, np.int64) if labels is None else np.array(labels),
        np.zeros(count, bool) if difficult is None else np.array(difficult), "a", np.ones(count))], Path("truth"))


def found(boxes, scores, labels=None):
    return [{"boxes": np.asarray(boxes), "scores": np.array(scores, dtype=np.float64),
             "labels": np.zeros(len(scores), np.int64) if labels is None else np.array(labels)}]


def ap50(detections, annotations):
    return dota_ap(detections, annotations)["AP50"]


# ---- the metric ------------------------------------------------------------------------------------------------------


def test_a_true_a_false_and_a_true_detection():
    annotations = truth(shifted(0, 50))
    assert ap50(found(shifted(0, 30, 50), [.9, .8, .7]), annotations) == pytest.approx(0.848485, abs=1e-6)
    assert ap50(found(shifted(0, 50), [.9, .8]), annotations) == 1
    assert ap50(found(shifted(0, 0, 50), [.9, .8, .7]), annotations) == pytest.approx(0.848485, abs=1e-6)  # a duplicate
    assert ap50(found(np.zeros((0, 8)), []), annotations) == 0


def test_difficult_objects_count_neither_for_nor_against():
    annotations = truth(shifted(0, 50), difficult=[True, False])
    assert ap50(found(shifted(0, 1, 50), [.9, .8, .7]), annotations) == 1
    result = dota_ap(found(shifted(0), [.9]), truth(shifted(0), difficult=[True]))
    assert result["AP50"] is None and result["per_class"][0]["objects"] == 0


def test_the_iou_must_exceed_the_threshold():
    """Moved by 10 / 3 the IoU is 1/2 but for rounding; a box of half the area has exactly that."""
    half = np.array([[0.0, 0, 10, 0, 10, 5, 0, 5]])
    assert overlap(half, shifted(0)).item() == 0.5
    assert ap50(found(half, [.9]), truth(shifted(0))) == 0
    assert ap50(found(shifted(3.3), [.9]), truth(shifted(0))) == 1


def test_the_iou_is_that_of_the_polygons_whatever_describes_them():
    diamond = np.array([[5.0, 0, 10, 5, 5, 10, 0, 5]])
    assert ap50(found(diamond, [.9]), truth(shifted(0))) == 0  # the horizontal boxes around them are the same
    assert ap50(found(diamond, [.9]), truth(diamond)) == 1
    box = np.array([[5, 5, 50**0.5, 50**0.5, np.pi / 4]])
    np.testing.assert_allclose(overlap(box, diamond), 1)
    np.testing.assert_allclose(overlap(np.array([[0.0, 0, 10, 5]]), shifted(0)), 0.5)
    assert overlap(np.zeros((0, 5)), box).shape == (0, 1)


def test_each_threshold_has_its_own_mean():
    result = dota_ap(found(shifted(1), [.9]), truth(shifted(0)))  # IoU 9 / 11 = .818
    assert result["per_iou"] == [1] * 7 + [0] * 3
    assert result["AP"] == pytest.approx(0.7) and result["AP75"] == 1
    true = [.60, .58, .55, .51, .46, .40, .32, .22, .11, .03]
    released = released_mean(true, 15)
    assert released == pytest.approx(0.404726, abs=1e-6)
    last = true[0]
    for value in true[1:]:
        last = value + last / 15
    assert 14 / 15 * released + last / 150 == pytest.approx(0.378)  # the way back to the right mean


def test_ap_is_that_of_a_slow_reference():
    """The devkit's steps, one detection after the other, on random scenes of two classes and three images."""
    generator = torch.Generator().manual_seed(0)
    records, detections = [], []
    for number in range(3):
        boxes = torch.rand(12, 5, generator=generator) * torch.tensor([100, 100, 30, 30, 1.5]) + 5
        jitter = torch.randn(40, 5, generator=generator) * torch.tensor([2, 2, 2, 2, .1])
        around = boxes[torch.randint(12, (40,), generator=generator)] + jitter
        labels = torch.randint(2, (12,), generator=generator).numpy()
        records.append(Record(Path(f"{number}.png"), 200, 200, boxes.numpy(), labels,
                              (torch.rand(12, generator=generator) < .2).numpy(), str(number), np.ones(12)))
        detections.append({"boxes": around, "scores": torch.rand(40, generator=generator),
                           "labels": torch.randint(2, (40,), generator=generator)})
    result = dota_ap(detections, Annotations(["a", "b"], records, Path("truth")))
    for label, row in enumerate(result["per_class"]):
        expected = [slow_ap(detections, records, label, threshold / 100) for threshold in range(50, 100, 5)]
        np.testing.assert_allclose(row["per_iou"], expected, atol=1e-12)
        assert 0.05 < row["AP50"] < 0.95


def slow_ap(detections, records, label, threshold):
    rows = [(float(score), number, shapely.Polygon(points)) for number, own in enumerate(detections)
            for score, points, kind in zip(own["scores"], corners(own["boxes"].double()).tolist(), own["labels"],
                                           strict=True) if kind == label]
    polygons = [[(shapely.Polygon(points), hard) for points, kind, hard in zip(
        corners(torch.from_numpy(record.boxes).double()).tolist(), record.labels, record.difficult, strict=True)
        if kind == label] for record in records]
    taken, hits, misses, points = set(), 0, 0, []
    objects = sum(not hard for own in polygons for _, hard in own)
    for _, number, polygon in sorted(rows, key=lambda row: -row[0]):
        overlaps = [polygon.intersection(other).area / polygon.union(other).area for other, _ in polygons[number]]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best >= 0 and overlaps[best] > threshold:
            if polygons[number][best][1]:
                continue
            hits += (number, best) not in taken
            misses += (number, best) in taken
            taken.add((number, best))
        else:
            misses += 1
        points.append((hits / objects, hits / (hits + misses)))
    return np.mean([max((precision for recall, precision in points if recall >= level), default=0)
                    for level in np.arange(0, 1.1, 0.1)])


# ---- submission files ------------------------------------------------------------------------------------------------


def submission(folder, **files):
    """A folder of Task1_<class>.txt. files: {class: lines}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"Task1_{name.replace('_', '-')}.txt").write_text("".join(line + "\n" for line in lines))
    return folder


def as_submission(labels, folder):
    """Label files as detections."""
    lines = {}
    for path in sorted(labels.glob("*.txt")):
        for item in read_label_file(path):
            points = " ".join(f"{value:g}" for point in item.points for value in point)
            lines.setdefault(item.name, []).append(f"{path.stem} 1.0 {points}")
    return submission(folder, **lines)


def test_what_is_written_is_read_again(tmp_path):
    boxes = torch.tensor([[50.0, 40, 20, 8, 0.3], [2000, 1000, 30, 10, 1.2], [9, 9, 5, 5, 0.1]])
    detections = {"P1": {"boxes": boxes[:2], "scores": torch.tensor([0.9, 0.25]), "labels": torch.tensor([1, 0])},
                  "P2": {"boxes": boxes[2:], "scores": torch.tensor([0.123456]), "labels": torch.tensor([1])},
                  "P3": {"boxes": boxes[:0], "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}}
    write_submission(tmp_path / "out.zip", detections, ["plane", "small-vehicle", "ship"])
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == ["Task1_plane.txt", "Task1_small-vehicle.txt", "Task1_ship.txt"]
        archive.extractall(tmp_path / "unpacked")
    found = read_submission(tmp_path / "out.zip")
    assert {name: [(own.image, own.score) for own in rows] for name, rows in found.items()} == {
        "plane": [("P1", 0.25)], "ship": [], "small-vehicle": [("P1", 0.9), ("P2", 0.123456)]}
    read = torch.tensor([found["small-vehicle"][0].points, found["plane"][0].points, found["small-vehicle"][1].points])
    torch.testing.assert_close(minimum_area_rectangle(read), boxes, atol=0.02, rtol=0)
    unpacked = read_submission(tmp_path / "unpacked")
    assert [own[:3] for own in unpacked["plane"]] == [own[:3] for own in found["plane"]]
    assert found["plane"][0].where == f"{tmp_path / 'out.zip'}/Task1_plane.txt:1"


GOOD = "P1 0.9 0 0 10 0 10 10 0 10"


@pytest.mark.parametrize("line", ["P1 0.9 0 0 10 0 10 10 0", GOOD + " 5", GOOD.replace("0.9", "nan"), "P1",
                                  GOOD.replace("0.9", "high"), GOOD.replace("10 10", "10 inf"), GOOD.replace(" ", ",")])
def test_a_malformed_line_is_named(tmp_path, line):
    submission(tmp_path, ship=[GOOD, "", line])
    with pytest.raises(UserError, match="expected 'image score x1 y1 x2 y2 x3 y3 x4 y4', found") as error:
        read_submission(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'Task1_ship.txt'}:3: ") and "\n" not in str(error.value)


def test_a_class_has_one_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for folder in "ab":
            archive.writestr(f"{folder}/Task1_ship.txt", GOOD)
    with pytest.raises(UserError, match="two.zip/b/Task1_ship.txt: another file is of this class"):
        read_submission(tmp_path / "two.zip")


@pytest.mark.parametrize(("method", "flags", "named", "damaged", "reason"), [
    (zipfile.ZIP_STORED, 1, zipfile.ZIP_STORED, 0, "is encrypted, password required for extraction"),
    (zipfile.ZIP_STORED, 0, 97, 0, "That compression method is not supported"),
    (zipfile.ZIP_LZMA, 0, zipfile.ZIP_LZMA, 20, "Corrupt input data"),
])
def test_an_archive_that_cannot_be_unpacked_is_one_line(tmp_path, method, flags, named, damaged, reason):
    """Encrypted, compressed by a method that Python does not know, or with `damaged` last bytes of its content."""
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("Task1_ship.txt", f"{GOOD}\n" * 50)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    for header in (0, directory + 2):  # the file's own, and its copy in the directory
        content[header + 6] |= flags
        content[header + 8] = named
    for place in range(directory - damaged, directory):
        content[place] ^= 0x5A
    path.write_bytes(content)
    with pytest.raises(UserError, match="could not be read .*; expected a folder or a .zip of detections") as error:
        read_submission(path)
    assert str(error.value).startswith(str(path)) and reason in str(error.value) and "\n" not in str(error.value)


def test_submissions_of_garbage_are_one_line(tmp_path):
    generator, outcomes = random.Random(0), set()
    write_submission(tmp_path / "good.zip", {}, ["ship", "plane"])
    for k in range(200):
        content = bytearray((tmp_path / "good.zip").read_bytes() if k % 2 else f"{GOOD}\n{GOOD}".encode())
        for _ in range(generator.randint(1, 5)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path = tmp_path / ("bad.zip" if k % 2 else "bad/Task1_ship.txt")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        try:
            read_submission(path if k % 2 else path.parent)
            outcomes.add("read")
        except UserError as error:
            assert str(error).startswith(str(path if k % 2 else path.parent)) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dota(tmp_path):
    """A folder of DOTA with two images, three ships and a plane."""
    return write_dota(tmp_path / "dota", {
        "P1": ((60, 50), ["0 0 10 0 10 10 0 10 ship 0", "30 0 40 0 40 10 30 10 ship 0",
                          "5 30 15 30 15 40 5 40 ship 1"]),
        "P2": ((60, 50), ["0 0 10 0 10 10 0 10 plane 0"])})


def test_detections_in_files_are_evaluated(tmp_path, dota):
    folder = submission(tmp_path / "found", ship=[GOOD, "P1 0.8 50 0 60 0 60 10 50 10", "P1 .7 30 0 40 0 40 9 30 9"],
                        plane=["P2 0.5 0 0 10 0 10 6 0 6"])
    done = run_program("-m", "detection.evaluate_dota", folder, dota / "labelTxt", "--output", tmp_path / "out")
    assert done.returncode == 0 and not done.stderr and "2 test images" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    plane, ship = results["per_class"]
    assert (plane["name"], plane["objects"], ship["name"], ship["objects"]) == ("plane", 1, "ship", 2)
    assert list(ship["AP"]) == [f"{threshold / 100:.2f}" for threshold in range(50, 100, 5)]
    assert ship["AP"]["0.50"] == pytest.approx(0.848485, abs=1e-6) and plane["AP"]["0.55"] == 1
    assert plane["AP"]["0.60"] == 0 and ship["AP"]["0.90"] == pytest.approx(6 / 11)  # at recalls of 0 to .5
    assert results["mAP"]["0.50"] == pytest.approx((1 + 0.848485) / 2, abs=1e-6)
    assert results["mAP_50_95"] == pytest.approx(np.mean(list(results["mAP"].values())))
    assert results["mAP_50_95_released"] > results["mAP_50_95"]


def evaluated(tmp_path, folder, labels, *flags):
    assert run(evaluate_dota, folder, labels, "--output", tmp_path / "out", *flags) == 0
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_list_names_the_images_to_evaluate(tmp_path, dota, capsys):
    folder = submission(tmp_path / "found", ship=[GOOD], plane=["P2 0.5 0 0 10 0 10 10 0 10"])
    (tmp_path / "list.txt").write_text("P2.png\n")
    results = evaluated(tmp_path, folder, dota / "labelTxt", "--images", tmp_path / "list.txt")
    assert results["images"] == 1 and results["mAP"]["0.95"] == 1
    assert [row["name"] for row in results["per_class"]] == ["plane"]
    assert "note: class ship has no objects, and is left out" in capsys.readouterr().out


def test_a_class_without_a_file_has_an_ap_of_zero(tmp_path, dota, capsys):
    results = evaluated(tmp_path, submission(tmp_path / "found", plane=["P2 0.5 0 0 10 0 10 10 0 10"]),
                        dota / "labelTxt")
    assert [row["AP"]["0.50"] for row in results["per_class"]] == [1, 0] and results["mAP"]["0.50"] == 0.5
    assert "note: class ship has no file of detections" in capsys.readouterr().out


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, dota, capsys):
    folder = submission(tmp_path / "found", ship=[GOOD, "P1 0.9 0 0"])

    def refused(*arguments):
        assert run(evaluate_dota, *arguments, "--output", tmp_path / "out") == 2
        return error_line(capsys)

    assert "Task1_ship.txt:2: expected" in refused(folder, dota / "labelTxt")
    submission(folder, ship=[GOOD, "P9" + GOOD[2:]])
    assert "Task1_ship.txt:2: image 'P9' has no label file" in refused(folder, dota / "labelTxt")
    submission(folder, ship=[GOOD])
    assert "no such folder" in refused(folder, tmp_path / "none")
    assert "no label file" in refused(folder, dota / "images")
    assert "no file Task1_<class>.txt" in refused(dota, dota / "labelTxt")
    assert "could not be read" in refused(tmp_path / "none.zip", dota / "labelTxt")
    (tmp_path / "list.txt").write_text("P1\nP9\n")
    assert "list.txt:2: image 'P9' has no label file" in refused(folder, dota / "labelTxt", "--images",
                                                                 tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("P1\nP1.png\n")
    assert "list.txt:2: image 'P1.png' is listed twice" in refused(folder, dota / "labelTxt", "--images",
                                                                   tmp_path / "list.txt")
    (dota / "labelTxt" / "P2.txt").write_text("1 2 3\n")
    assert "P2.txt:1: expected 'x1 y1" in refused(folder, dota / "labelTxt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{}")
    assert "holds a run of its own" in refused(folder, dota / "labelTxt")


def test_a_detector_of_horizontal_boxes_is_tested_by_it(tmp_path, dota):
    shutil.copytree(dota, tmp_path / "train")
    assert run_detector(train_gfl, "--train", tmp_path / "train", "--test", dota, "--output", tmp_path / "run",
                        *QUICK_DETECTOR, "--epochs", 1, "--metric", "dota") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metric"].startswith("DOTA") and len(results["per_iou"]) == 10
    assert (tmp_path / "run" / "detections.png").exists()


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["dota_examples", "hit_uav/test"])
def test_real_labels_as_detections_are_perfect(tmp_path, name):
    labels = real(name) / "labelTxt"
    results = evaluated(tmp_path, as_submission(labels, tmp_path / "found"), labels)
    assert len(results["per_class"]) in (4, 11) and results["mAP_50_95"] == 1
    assert all(value == 1 for row in results["per_class"] for value in row["AP"].values())
