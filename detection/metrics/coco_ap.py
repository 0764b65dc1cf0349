"""COCO average precision and recall by pycocotools, which every published COCO AP was computed with."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.records import Annotations, Record

STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
         "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


def coco_ap(detections: Sequence[Mapping[str, Any]], annotations: Annotations) -> dict[str, Any]:
    """COCO's twelve figures for boxes (Lin et al., Microsoft COCO, ECCV 2014), with at most 100 detections of a class
    in an image.

    AP is the mean over IoU .50, .55, ... .95 and the classes; small objects have an area of up to 32^2, medium ones up
    to 96^2 pixels; AR_n is the mean recall with the n highest-scoring detections of each class in an image.

    detections: a dict for each of `annotations.records`, with boxes (M, 4) xyxy, scores (M,) and labels (M,). Difficult
    objects, be they COCO's crowds or Pascal VOC's `difficult`, are what COCO calls crowds: of the detections that no
    other object claims, any number may lie in one (the shared part of THEIR area reaches the threshold) and are neither
    true nor false. Returns fractions: the twelve, and `per_class`, dicts of name, objects (without crowds), AP, AP50,
    AP75, AP_small, AP_medium and AP_large. What has no object to be measured by is None. `curves` is for pictures:
    {class: (recall (101,), precision (101,), AP50)} at IoU .5."""
    evaluation = _evaluate(_objects(annotations.records), _found(detections), annotations)
    precision = evaluation.eval["precision"][..., -1]  # (10 IoU, 101 recalls, C, 4 areas) with 100 detections; -1: none
    recall = evaluation.params.recThrs
    counted = np.concatenate([record.labels[~record.difficult] for record in annotations.records])
    objects = np.bincount(counted, minlength=len(annotations.classes)).tolist()
    per_class, curves = [], {}
    for c, name in enumerate(annotations.classes):
        everything, small, medium, large = (precision[:, :, c, area] for area in range(4))
        row = {"name": name, "objects": objects[c], "AP": _mean(everything), "AP50": _mean(everything[0]),
               "AP75": _mean(everything[5]), "AP_small": _mean(small), "AP_medium": _mean(medium),
               "AP_large": _mean(large)}
        if row["AP"] is not None:
            curves[name] = (recall, everything[0], row["AP50"])
        per_class.append(row)
    stats = [None if value < 0 else float(value) for value in evaluation.stats]
    return {"metric": "COCO AP", "images": len(annotations.records), **dict(zip(STATS, stats, strict=True)),
            "per_class": per_class, "curves": curves}


def coco_results(detections: Sequence[Mapping[str, Any]], annotations: Annotations) -> list[dict[str, Any]]:
    """The entries of a COCO results file, as pycocotools' `loadRes` and COCO's server read it, with the image and
    category ids of the annotation file. Detections of classes that it does not have are left out.

    detections: as in `coco_ap`. annotations: of one COCO file."""
    ids = [annotations.category_ids.get(name) for name in annotations.classes]
    return [{"image_id": record.image_id, "category_id": ids[label], "bbox": box, "score": score}
            for record, found in zip(annotations.records, detections, strict=True)
            for box, label, score in zip(_xywh(found["boxes"]), found["labels"].tolist(), found["scores"].tolist(),
                                         strict=True) if ids[label] is not None]


def _mean(precision: np.ndarray) -> float | None:
    """The mean precision, None where pycocotools says that there was no object (-1)."""
    return None if precision.min() < 0 else float(precision.mean())


def _evaluate(objects: list[dict[str, Any]], found: list[dict[str, Any]], annotations: Annotations) -> COCOeval:
    """pycocotools' evaluation of `found`, with its messages left out; images and classes are numbered from 1."""
    shared = {"images": [{"id": number} for number, _ in enumerate(annotations.records, 1)],
              "categories": [{"id": number, "name": name} for number, name in enumerate(annotations.classes, 1)]}
    tables = []
    with contextlib.redirect_stdout(io.StringIO()):
        for boxes in (objects, found):
            # An index of its own, where COCO.loadRes would fail if nothing was detected.
            table = COCO()
            table.dataset = {**shared, "annotations": boxes}
            table.createIndex()
            tables.append(table)
        evaluation = COCOeval(*tables, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _objects(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The records' objects as COCO's annotations."""
    rows = []
    for image, record in enumerate(records, 1):
        for box, label, area, difficult in zip(_xywh(record.boxes), record.labels.tolist(), record.areas.tolist(),
                                               record.difficult.tolist(), strict=True):
            rows.append({"id": len(rows) + 1, "image_id": image, "category_id": label + 1, "bbox": box, "area": area,
                         "iscrowd": int(difficult)})
    return rows


def _found(detections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The detections as COCO's results; their area is the box's."""
    rows = []
    for image, found in enumerate(detections, 1):
        for box, label, score in zip(_xywh(found["boxes"]), found["labels"].tolist(), found["scores"].tolist(),
                                     strict=True):
            rows.append({"id": len(rows) + 1, "image_id": image, "category_id": label + 1, "bbox": box,
                         "area": box[2] * box[3], "iscrowd": 0, "score": score})
    return rows


def _xywh(boxes: Any) -> list[list[float]]:
    """(M, 4) boxes xyxy as a list of [x, y, width, height]."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
