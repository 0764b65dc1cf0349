"""DOTA's average precision of oriented boxes, Task 1 of its development kit (Xia et al., DOTA, CVPR 2018): Pascal VOC's
11-point AP with the IoU of polygons, which must exceed a threshold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from detection.data.records import Annotations
from detection.geometry.oriented import corners, from_horizontal, polygon_iou
from detection.metrics.voc_ap import IOU_THRESHOLDS, match, summarise


def dota_ap(detections: Sequence[Mapping[str, Any]], annotations: Annotations) -> dict[str, Any]:
    """At IoU .50, .55, ... .95, the mean over classes at each. Difficult objects count neither for nor against.

    detections: a dict an image of `annotations.records`, with boxes, scores (M,) and labels (M,). The boxes of both may
    be (M, 4), horizontal, (M, 5), oriented, or (M, 8), the points x1 y1 ... x4 y4. Returns what voc_ap.summarise does;
    each threshold has its own mean (see `released_mean`)."""
    matched = match(detections, annotations.records, IOU_THRESHOLDS, overlap, np.greater)
    return summarise(matched, annotations, "11-point", "DOTA AP of oriented boxes, 11-point")


def overlap(boxes: ArrayLike, objects: ArrayLike) -> np.ndarray:
    """IoU of each of M boxes with each of G objects, (M, G) float64."""
    return polygon_iou(_polygons(boxes)[:, None], _polygons(objects)).numpy()


def _polygons(boxes: ArrayLike) -> torch.Tensor:
    """Boxes (M, 4), (M, 5) or (M, 8) -> (M, 4, 2) float64."""
    boxes = torch.from_numpy(np.asarray(boxes, dtype=np.float64))
    if boxes.shape[-1] == 8:
        return boxes.unflatten(-1, (4, 2))
    return corners(boxes if boxes.shape[-1] == 5 else from_horizontal(boxes))


def released_mean(per_iou: Sequence[float], classes: int) -> float:
    """The mean over the thresholds as the script released with Rotated LD computes it, to compare with tables that were
    made with it. Its sum over classes is not set back between thresholds: reported_k = AP_k + reported_(k-1) / classes.
    AP50 is right in both.

    per_iou: the APs at rising thresholds, fractions. classes: how many."""
    reported = [per_iou[0]]
    for value in per_iou[1:]:
        reported.append(value + reported[-1] / classes)
    return float(np.mean(reported))
