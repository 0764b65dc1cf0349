"""Average precision: Pascal VOC's against a slow reference and by hand, COCO's against figures of pycocotools."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.records import Annotations, Record
from detection.metrics.coco_ap import STATS, coco_ap, coco_results
from detection.metrics.voc_ap import IOU_THRESHOLDS, average_precision, envelope, match, voc_ap
from detection.tables import results_table

CLASSES = ["ship", "plane", "harbour", "bridge"]
BOX, FAR, NEAR = [10, 10, 50, 50], [100, 100, 140, 140], [10, 10, 50, 46]  # BOX and NEAR: IoU .9


def record_of(boxes=(), labels=(), difficult=None, areas=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    difficult = np.zeros(len(boxes), bool) if difficult is None else np.array(difficult, bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) if areas is None else areas
    return Record(Path("image.png"), 320, 300, boxes, np.array(labels, np.int64), difficult, 1,
                  np.array(areas, np.float64))


def found_of(boxes=(), labels=(), scores=()):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "scores": torch.tensor(scores).view(-1),
            "labels": torch.tensor(labels, dtype=torch.int64).view(-1)}


def annotations_of(*records, classes=CLASSES):
    return Annotations(list(classes), list(records), Path("hand"))


def random_set(seed, images=12, classes=3):
    """Records and detections with near hits, duplicates, difficult objects, equal scores and empty images."""
    generator = np.random.default_rng(seed)
    records, detections = [], []
    for _ in range(images):
        corner = generator.integers(0, 200, (generator.integers(0, 6), 2))
        boxes = np.concatenate([corner, corner + generator.integers(15, 100, corner.shape)], 1)
        labels = generator.integers(0, classes, len(boxes))
        chosen = generator.integers(0, max(len(boxes), 1), generator.integers(0, 12) if len(boxes) else 0)
        moved = boxes[chosen] + generator.integers(-6, 7, (len(chosen), 4))
        wrong = generator.random(len(chosen)) < 0.1
        scores = np.sort(generator.integers(1, 40, len(chosen)) / 40)[::-1].copy()
        records.append(record_of(boxes, labels, generator.random(len(boxes)) < 0.2))
        detections.append(found_of(moved.tolist(), np.where(wrong, 0, labels[chosen]).tolist(), scores.tolist()))
    return detections, annotations_of(*records, classes=CLASSES[:classes])


# ---- Pascal VOC ------------------------------------------------------------------------------------------------------


def slow_iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def slow_match(detections, records, label, threshold):
    """The verdicts on the detections of one class, by falling score: "true", "false" or "neither"."""
    rows = []
    for image, found in enumerate(detections):
        for box, own, score in zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(),
                                   strict=True):
            if own == label:
                rows.append((score, image, box))
    taken, verdicts = set(), []
    for _, image, box in sorted(rows, key=lambda row: -row[0]):
        best, best_object = 0.0, None
        for g, other in enumerate(records[image].boxes.tolist()):
            if records[image].labels[g] == label and slow_iou(box, other) > best:
                best, best_object = slow_iou(box, other), g
        if best < threshold:
            verdicts.append("false")
        elif records[image].difficult[best_object]:
            verdicts.append("neither")
        else:
            verdicts.append("false" if (image, best_object) in taken else "true")
            taken.add((image, best_object))
    return verdicts


def slow_average_precision(verdicts, objects, rule):
    true = false = 0
    points = []
    for verdict in verdicts:
        true, false = true + (verdict == "true"), false + (verdict == "false")
        if verdict != "neither":
            points.append((true / objects, true / (true + false)))
    if rule == "11-point":
        return sum(max([p for r, p in points if r >= 0.1 * level], default=0) for level in range(11)) / 11
    area = previous = 0.0
    for recall, _ in points:
        area += (recall - previous) * max(p for r, p in points if r >= recall)
        previous = recall
    return area


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_that_of_a_loop_over_the_detections(seed):
    detections, annotations = random_set(seed)
    labels, true, false = match(detections, annotations.records, IOU_THRESHOLDS)
    assert true.any() and false.any() and not (true & false).any() and not (true | false).all()
    for t, threshold in enumerate(IOU_THRESHOLDS):
        for label in range(3):
            of_class = labels == label
            names = np.where(true[t, of_class], "true", np.where(false[t, of_class], "false", "neither"))
            assert names.tolist() == slow_match(detections, annotations.records, label, threshold)


@pytest.mark.parametrize("rule", ["11-point", "area"])
def test_the_ap_of_random_sets_is_that_of_a_loop(rule):
    detections, annotations = random_set(7, images=20)
    table = np.zeros((10, 3))
    for label in range(3):
        objects = sum(int(((record.labels == label) & ~record.difficult).sum()) for record in annotations.records)
        for t, threshold in enumerate(IOU_THRESHOLDS):
            verdicts = slow_match(detections, annotations.records, label, threshold)
            table[t, label] = slow_average_precision(verdicts, objects, rule)
    found = voc_ap(detections, annotations, rule)
    assert 0.05 < found["AP"] < 0.95
    assert found["AP"] == pytest.approx(table.mean()) and found["per_iou"] == pytest.approx(table.mean(1))
    assert found["AP50"] == pytest.approx(table[0].mean()) and found["AP75"] == pytest.approx(table[5].mean())
    for label, row in enumerate(found["per_class"]):
        assert row["AP"] == pytest.approx(table[:, label].mean()) and row["AP50"] == pytest.approx(table[0, label])


def test_true_false_true_on_two_objects():
    recall, precision = np.array([0.5, 0.5, 1]), np.array([1, 0.5, 2 / 3])
    assert average_precision(recall, precision, "11-point") == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert average_precision(recall, precision, "11-point") == pytest.approx(0.848485, abs=1e-6)
    assert average_precision(recall, precision, "area") == pytest.approx(0.833333, abs=1e-6)
    assert envelope(precision).tolist() == [1, 2 / 3, 2 / 3]
    annotations = annotations_of(record_of([BOX, FAR], [0, 0]), classes=["ship"])
    detections = [found_of([BOX, [200, 10, 240, 50], FAR], [0, 0, 0], [0.9, 0.8, 0.7])]
    assert voc_ap(detections, annotations, "11-point")["AP"] == pytest.approx(0.848485, abs=1e-6)
    assert voc_ap(detections, annotations, "area")["AP"] == pytest.approx(0.833333, abs=1e-6)


def test_a_recall_of_exactly_three_tenths_misses_the_level_of_three_tenths_as_in_the_original():
    assert average_precision(np.array([0.1, 0.2, 0.3]), np.ones(3), "11-point") == pytest.approx(3 / 11)
    assert average_precision(np.array([0.1, 0.2, 0.4, 0.5]), np.ones(4), "11-point") == pytest.approx(6 / 11)


@pytest.mark.parametrize("rule", ["11-point", "area"])
def test_perfect_is_one_and_nothing_is_zero(rule):
    annotations = annotations_of(record_of([BOX, FAR], [0, 1]), record_of(), record_of([BOX], [0]))
    perfect = [found_of([BOX, FAR], [0, 1], [0.9, 0.8]), found_of(), found_of([BOX], [0], [0.4])]
    found = voc_ap(perfect, annotations, rule)
    assert found["AP"] == found["AP50"] == found["AP75"] == 1 and found["per_iou"] == [1] * 10
    assert found["images"] == 3 and [row["objects"] for row in found["per_class"]] == [2, 1, 0, 0]
    nothing = voc_ap([found_of()] * 3, annotations, rule)
    assert nothing["AP"] == 0 and nothing["per_class"][0]["AP"] == 0
    assert len(nothing["curves"]["ship"][0]) == 0


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="11-point, area"):
        average_precision(np.ones(1), np.ones(1), "12-point")


def test_a_difficult_object_is_not_counted_and_what_finds_it_neither():
    annotations = annotations_of(record_of([BOX, FAR], [0, 0], [False, True]), classes=["ship"])
    boxes, scores = [FAR, FAR, BOX], [0.9, 0.8, 0.7]
    labels, true, false = match([found_of(boxes, [0] * 3, scores)], annotations.records, [0.5])
    assert true.tolist() == [[False, False, True]] and false.tolist() == [[False, False, False]]
    found = voc_ap([found_of(boxes, [0] * 3, scores)], annotations, "area")
    assert found["AP"] == 1 and found["per_class"][0]["objects"] == 1


def test_the_second_on_one_object_is_false_even_if_it_fits_better():
    records = [record_of([BOX, FAR], [0, 0])]
    _, true, false = match([found_of([NEAR, BOX], [0, 0], [0.9, 0.8])], records, [0.5, 0.95])
    assert true.tolist() == [[True, False], [False, True]] and false.tolist() == [[False, True], [True, False]]


def test_an_iou_equal_to_the_threshold_is_enough():
    records = [record_of([[0, 0, 10, 10]], [0])]
    for part in (6, 7, 9):  # tenths that ten equal steps of .05 miss by a rounding error
        _, true, _ = match([found_of([[0, 0, 10, part]], [0], [0.5])], records, IOU_THRESHOLDS)
        assert true[:, 0].sum() == 2 * part - 9
    assert not match([found_of([[0, 0, 10, 5.9]], [0], [0.5])], records, [0.6])[1].any()


def test_another_class_or_another_image_is_no_hit_and_a_box_that_is_no_number_is_false():
    records = [record_of([BOX], [0]), record_of([FAR], [1])]
    detections = [found_of([BOX, [float("nan")] * 4], [1, 0], [0.9, 0.8]), found_of([BOX], [0], [0.7])]
    _, true, false = match(detections, records, [0.5])
    assert not true.any() and false.all()


def test_a_class_without_objects_is_none_and_does_not_count():
    annotations = annotations_of(record_of([BOX, FAR], [0, 1], [False, True]))
    found = voc_ap([found_of([BOX, FAR, FAR], [0, 1, 2], [0.9, 0.8, 0.7])], annotations, "area")
    assert [row["AP"] for row in found["per_class"]] == [1, None, None, None] and found["AP"] == 1
    assert list(found["curves"]) == ["ship"]
    empty = voc_ap([found_of([BOX], [0], [0.9])], annotations_of(record_of()), "area")
    assert empty["AP"] is empty["AP50"] is empty["per_iou"] is None and empty["curves"] == {}


def test_the_area_rule_rewards_recall_that_the_eleven_points_miss():
    records = [record_of([BOX], [0]) for _ in range(21)]
    detections = [found_of([BOX], [0], [0.9])] + [found_of()] * 20
    annotations = annotations_of(*records, classes=["ship"])
    assert voc_ap(detections, annotations, "area")["AP"] == pytest.approx(1 / 21)
    assert voc_ap(detections, annotations, "11-point")["AP"] == pytest.approx(1 / 11)


def test_curves_are_those_at_half_overlap():
    annotations = annotations_of(record_of([BOX, FAR], [0, 0]), classes=["ship"])
    recall, precision, ap = voc_ap([found_of([NEAR, NEAR], [0, 0], [0.9, 0.8])], annotations, "area")["curves"]["ship"]
    assert recall.tolist() == [0.5, 0.5] and precision.tolist() == [1, 0.5] and ap == 0.5


# ---- COCO ------------------------------------------------------------------------------------------------------------

# (image, class, x, y, width, height, area, crowd) and (image, class, x, y, width, height, score), all from 1.
OBJECTS = [
    (1, 1, 10, 12, 20, 18, 330.0, 0), (1, 1, 60, 40, 25, 30, 700.0, 0), (1, 2, 100, 80, 70, 60, 4000.0, 0),
    (1, 1, 200, 20, 90, 40, 3400.0, 1), (2, 2, 30, 30, 150, 120, 16000.0, 0), (2, 2, 220, 50, 50, 50, 2400.0, 0),
    (2, 3, 5, 180, 300, 110, 30500.0, 0), (3, 1, 50, 60, 28, 26, 690.0, 0), (3, 3, 120, 40, 96, 100, 9216.0, 0),
    (3, 2, 240, 150, 40, 20, 800.0, 0)]
FOUND = [
    (1, 1, 11, 12, 20, 18, .95), (1, 1, 58, 43, 27, 28, .80), (1, 1, 61, 40, 24, 30, .55), (1, 1, 210, 25, 30, 20, .90),
    (1, 2, 108, 84, 70, 60, .85), (1, 4, 5, 5, 50, 50, .60), (2, 2, 33, 28, 150, 125, .92),
    (2, 2, 221, 58, 48, 44, .50), (2, 3, 20, 190, 290, 105, .70), (2, 1, 90, 200, 25, 25, .88),
    (2, 3, 5, 180, 120, 100, .75), (3, 1, 53, 63, 28, 26, .65), (3, 3, 125, 44, 90, 99, .60),
    (3, 2, 100, 100, 60, 60, .97)]
# pycocotools 2.0.11, from the same tables as JSON files.
FROZEN = (0.476578658, 0.688393839, 0.491199120, 0.300099010, 0.575082508, 0.691749175,
          0.394444444, 0.672222222, 0.672222222, 0.383333333, 0.675, 0.825)
FROZEN_CLASSES = {
    "ship": (3, 0.600198020, 0.834158416, 0.554455446, 0.600198020, None, None),
    "plane": (4, 0.346039604, 0.564356436, 0.252475248, 0, 0.350165017, 0.9),
    "harbour": (2, 0.483498350, 0.666666667, 0.666666667, None, 0.8, 0.483498350),
    "bridge": (0, None, None, None, None, None, None)}


def corners(x, y, width, height):
    return [x, y, x + width, y + height]


def frozen_set():
    records, detections = [], []
    for image in (1, 2, 3):
        objects = [row for row in OBJECTS if row[0] == image]
        found = sorted((row for row in FOUND if row[0] == image), key=lambda row: -row[6])
        records.append(record_of([corners(*row[2:6]) for row in objects], [row[1] - 1 for row in objects],
                                 [row[7] for row in objects], [row[6] for row in objects]))
        detections.append(found_of([corners(*row[2:6]) for row in found], [row[1] - 1 for row in found],
                                   [row[6] for row in found]))
    return detections, annotations_of(*records)


def test_the_twelve_figures_of_a_frozen_set(capsys):
    found = coco_ap(*frozen_set())
    assert [found[name] for name in STATS] == pytest.approx(FROZEN, abs=1e-8)
    keys = ("objects", "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    for row in found["per_class"]:
        assert [row[key] for key in keys] == pytest.approx(FROZEN_CLASSES[row["name"]], abs=1e-8)
    assert list(found["curves"]) == ["ship", "plane", "harbour"] and capsys.readouterr().out == ""
    recall, precision, ap = found["curves"]["ship"]
    assert recall.shape == precision.shape == (101,) and ap == pytest.approx(precision.mean())


def test_the_figures_are_those_of_files_read_by_pycocotools(tmp_path):
    detections, annotations = random_set(3, images=30)
    objects, found = [], []
    for image, (record, detected) in enumerate(zip(annotations.records, detections, strict=True), 10):
        for (x, y, right, bottom), label, difficult in zip(record.boxes.tolist(), record.labels.tolist(),
                                                           record.difficult.tolist(), strict=True):
            objects.append({"id": len(objects) + 7, "image_id": image, "category_id": 5 * label + 2, "area":
                            (right - x) * (bottom - y), "bbox": [x, y, right - x, bottom - y], "iscrowd": difficult})
        for (x, y, right, bottom), label, score in zip(detected["boxes"].tolist(), detected["labels"].tolist(),
                                                       detected["scores"].tolist(), strict=True):
            found.append({"image_id": image, "category_id": 5 * label + 2, "score": score,
                          "bbox": [x, y, right - x, bottom - y]})
    (tmp_path / "objects.json").write_text(json.dumps({
        "images": [{"id": image} for image in range(10, 40)], "annotations": objects,
        "categories": [{"id": 5 * label + 2, "name": CLASSES[label]} for label in range(3)]}))
    (tmp_path / "found.json").write_text(json.dumps(found))
    truth = COCO(str(tmp_path / "objects.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    result = coco_ap(detections, annotations)
    assert 0.1 < result["AP"] < 0.9
    assert [-1 if result[name] is None else result[name] for name in STATS] == evaluation.stats.tolist()


def test_perfect_detections_have_an_ap_of_one_and_none_at_all_zero():
    annotations = annotations_of(record_of([BOX, FAR], [0, 1]), record_of(), record_of([[0, 0, 200, 200]], [0]))
    perfect = [found_of([BOX, FAR], [0, 1], [0.9, 0.8]), found_of(), found_of([[0, 0, 200, 200]], [0], [0.4])]
    found = coco_ap(perfect, annotations)
    assert [found[name] for name in ("AP", "AP50", "AR_1", "AP_medium", "AP_large")] == pytest.approx([1] * 5)
    assert found["AP_small"] is found["AR_small"] is found["per_class"][2]["AP"] is None
    nothing = coco_ap([found_of()] * 3, annotations)
    assert nothing["AP"] == nothing["AR_100"] == nothing["per_class"][0]["AP"] == 0 and nothing["AP_small"] is None
    assert nothing["per_class"][3] == {"name": "bridge", "objects": 0, **dict.fromkeys(STATS[:6])}


def test_images_without_any_object_have_no_ap():
    found = coco_ap([found_of([BOX], [0], [0.9])], annotations_of(record_of()))
    assert all(found[name] is None for name in STATS) and found["curves"] == {}


def test_any_number_of_detections_may_lie_in_a_crowd():
    crowd = [100, 100, 300, 300]
    inside = [[x, 110, x + 20, 130] for x in range(110, 270, 30)]  # an IoU of .01 with it
    scores = [0.9 - 0.01 * i for i in range(len(inside))]
    detections = [found_of([*inside, BOX], [0] * (len(inside) + 1), [*scores, 0.5])]
    with_crowd = coco_ap(detections, annotations_of(record_of([BOX, crowd], [0, 0], [False, True])))
    assert with_crowd["AP"] == pytest.approx(1) and with_crowd["per_class"][0]["objects"] == 1
    without = coco_ap(detections, annotations_of(record_of([BOX], [0])))
    assert without["AP"] == pytest.approx(1 / (len(inside) + 1))


@pytest.mark.parametrize(("others", "recall"), [(99, 1), (100, 0)])
def test_a_hundred_detections_of_an_image_count(others, recall):
    found = found_of([[200, 200, 210, 210]] * others + [BOX], [0] * (others + 1), [0.9] * others + [0.5])
    assert coco_ap([found], annotations_of(record_of([BOX], [0])))["AR_100"] == pytest.approx(recall)


def test_what_is_measured_by_area_follows_the_records_area_and_not_the_box():
    large_box = [0, 0, 200, 200]
    found = coco_ap([found_of([large_box], [0], [0.9])], annotations_of(record_of([large_box], [0], areas=[500.0])))
    assert found["AP_small"] == pytest.approx(1) and found["AP_large"] is None


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_coco_has_sizes_and_recalls():
    lines = results_table(coco_ap(*frozen_set())).splitlines()
    assert lines[0].split() == ["class", "objects", "AP", "AP50", "AP75", "small", "medium", "large"]
    assert lines[2].split() == ["plane", "4", "34.6", "56.4", "25.2", "0.0", "35.0", "90.0"]
    assert lines[4].split() == ["bridge", "0", "-", "-", "-", "-", "-", "-"]
    assert lines[5].split() == ["all", "9", "47.7", "68.8", "49.1", "30.0", "57.5", "69.2"]
    assert lines[6] == "average recall: 1 39.4   10 67.2   100 67.2   small 38.3   medium 67.5   large 82.5"
    assert lines[7] == "3 test images; COCO AP" and len({len(line) for line in lines[:6]}) == 1


def test_the_table_of_pascal_voc_names_its_rule():
    annotations = annotations_of(record_of([BOX, FAR], [0, 1]), classes=["ship", "a class of a long name"])
    lines = results_table(voc_ap([found_of([BOX], [0], [0.9])], annotations, "11-point")).splitlines()
    assert lines[0].split() == ["class", "objects", "AP", "AP50", "AP75"]
    assert lines[1].split() == ["ship", "1", "100.0", "100.0", "100.0"] and lines[3].split()[:3] == ["all", "2", "50.0"]
    assert lines[4] == "1 test images; Pascal VOC AP, 11-point"


# ---- COCO's results files --------------------------------------------------------------------------------------------


def test_a_results_file_has_the_ids_of_the_annotation_file_and_the_same_ap():
    detections, annotations = random_set(5)
    records = [replace(record, image_id=90 + 3 * number) for number, record in enumerate(annotations.records)]
    annotations = replace(annotations, records=records, category_ids={"plane": 7, "harbour": 3, "ship": 12})
    objects = [(record.image_id, annotations.category_ids[CLASSES[label]], box, bool(crowd)) for record in records
               for box, label, crowd in zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)]
    truth = COCO()
    truth.dataset = {"info": {}, "images": [{"id": record.image_id} for record in records],
                     "categories": [{"id": number} for number in annotations.category_ids.values()],
                     "annotations": [{"id": number, "image_id": image, "category_id": category, "iscrowd": int(crowd),
                                      "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                                      "area": (box[2] - box[0]) * (box[3] - box[1])}
                                     for number, (image, category, box, crowd) in enumerate(objects, 1)]}
    rows = json.loads(json.dumps(coco_results(detections, annotations)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = coco_ap(detections, annotations)
    assert 0.1 < ours["AP"] < 0.9
    expected = [-1 if ours[name] is None else ours[name] for name in STATS]
    assert evaluation.stats.tolist() == pytest.approx(expected, abs=1e-12)
    fewer = replace(annotations, category_ids={"plane": 7})
    assert coco_results(detections, fewer) == [row for row in coco_results(detections, annotations)
                                               if row["category_id"] == 7] != []
