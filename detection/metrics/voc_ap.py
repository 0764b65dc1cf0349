"""Pascal VOC average precision (Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010), also at IoU
thresholds above .5. COCO's own, which matches otherwise, is in coco_ap.py; that of oriented boxes in dota_ap.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from detection.data.records import Annotations, Record

# As hundredths: steps of .05, added up, miss .6 and .7, and with them an IoU of 3 / 5.
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
RULES = ("11-point", "area")
# As the original has them: .3, .6 and .7 are a rounding error higher, and a recall of exactly 3 / 10 does not reach .3.
RECALL_LEVELS = np.arange(0, 1.001, 0.1)


def box_iou(boxes: ArrayLike, objects: ArrayLike) -> np.ndarray:
    """IoU of each of boxes (M, 4) xyxy with each of objects (G, 4) -> (M, G) float64."""
    boxes, objects = (np.asarray(b, np.float64).reshape(-1, 4) for b in (boxes, objects))
    low = np.maximum(boxes[:, None, :2], objects[:, :2])
    high = np.minimum(boxes[:, None, 2:], objects[:, 2:])
    overlap = (high - low).clip(0).prod(2)  # (M, G)
    areas, object_areas = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, objects))
    return overlap / np.maximum(areas[:, None] + object_areas - overlap, 1e-12)


def match(detections: Sequence[Mapping[str, Any]], records: Sequence[Record],
          thresholds: Sequence[float] | np.ndarray,
          overlap: Callable[[ArrayLike, ArrayLike], np.ndarray] = box_iou,
          enough: np.ufunc = np.greater_equal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which detections are true and which are false, the highest-scoring of all images first.

    Each takes the object of its class with the largest IoU in its image, difficult ones included. With an IoU of at
    least the threshold it is true if it is the first there, false if another was before; at a difficult object it is
    neither. With less it is false.

    detections: a dict an image, with boxes (M, 4) xyxy, scores (M,) and labels (M,). records: the ground truth of the
    same images, with boxes (G, 4), labels (G,) and difficult (G,). overlap: the IoU of boxes (M, 4) and (G, 4), or of
    those of another kind. enough: whether an IoU reaches a threshold. Returns labels (D,) int64, true (T, D) bool and
    false (T, D) bool, sorted by falling score."""
    firsts = np.cumsum([0, *(len(record.labels) for record in records)])
    pairs = [_best_objects(found, record, overlap) for found, record in zip(detections, records, strict=True)]
    scores = np.concatenate([np.asarray(found["scores"]) for found in detections])
    order = np.argsort(-scores, kind="stable")
    labels = np.concatenate([np.asarray(found["labels"]) for found in detections])[order]
    iou = np.concatenate([iou for iou, _ in pairs])[order]  # (D,)
    objects = np.concatenate([best + first for (_, best), first in zip(pairs, firsts[:-1], strict=True)])[order]  # (D,)
    difficult = np.concatenate([record.difficult for record in records])

    overlapping = enough(iou, np.reshape(thresholds, (-1, 1)))  # (T, D)
    true, false = np.zeros_like(overlapping), ~overlapping
    for t in range(len(thresholds)):
        hits = np.flatnonzero(overlapping[t])
        hits = hits[~difficult[objects[hits]]]
        _, earliest = np.unique(objects[hits], return_index=True)
        true[t, hits[earliest]] = True
        false[t, hits] = ~true[t, hits]
    return labels, true, false


def _best_objects(found: Mapping[str, Any], record: Record,
                  overlap: Callable[[ArrayLike, ArrayLike], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU of each detection with an object of its class, -1 where there is none, and the object's index:
    (M,) float64 and (M,) int64."""
    iou = overlap(found["boxes"], record.boxes)  # (M, G)
    iou[np.asarray(found["labels"])[:, None] != record.labels] = -1
    iou = np.pad(iou, ((0, 0), (0, 1)), constant_values=-1)  # an image without objects has a largest IoU, too
    best = iou.argmax(1)
    return iou[np.arange(len(iou)), best], best


def average_precision(recall: np.ndarray, precision: np.ndarray, rule: str) -> float:
    """Average precision, 0..1, of one class.

    recall: (D,), not falling; precision: (D,), both by falling score. rule: `11-point`, the mean of the best precision
    at a recall of at least 0, .1, ... 1 (VOC 2007), or `area`, that under the curve whose precision at each recall is
    the best at that recall or a higher one (VOC 2010 and later). No detections: 0."""
    if rule == "11-point":
        return float(np.mean([precision[recall >= level].max(initial=0) for level in RECALL_LEVELS]))
    if rule == "area":
        return float(np.sum(np.diff(recall, prepend=0) * envelope(precision)))
    raise ValueError(f"rule {rule!r}: expected one of {', '.join(RULES)}")


def envelope(precision: np.ndarray) -> np.ndarray:
    """The best precision at each recall or a higher one: (D,) by rising recall -> (D,), not rising."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def voc_ap(detections: Sequence[Mapping[str, Any]], annotations: Annotations, rule: str) -> dict[str, Any]:
    """Pascal VOC AP as detectors are compared by it: at IoU .50, .55, ... .95, the mean over classes at each.

    detections: a dict an image of `annotations.records`, as `match` takes them. rule: see `average_precision`. Returns
    what `summarise` does."""
    return summarise(match(detections, annotations.records, IOU_THRESHOLDS), annotations, rule,
                     f"Pascal VOC AP, {rule}")


def summarise(matched: tuple[np.ndarray, np.ndarray, np.ndarray], annotations: Annotations, rule: str,
              metric: str) -> dict[str, Any]:
    """The APs of what `match` returned for the ten IoU thresholds. metric: the name of the whole.

    Returns fractions: `AP` (the mean over the ten IoU), `AP50`, `AP75`, `per_iou` (the ten), and `per_class`, dicts of
    name, objects (without the difficult ones), and the same four. A class without objects has None and does not count;
    where no class has any, all is None. `curves` is for pictures: {class: (recall (D,), precision (D,), AP50)} at IoU
    .5."""
    labels, true, false = matched
    counted = np.concatenate([record.labels[~record.difficult] for record in annotations.records])
    objects = np.bincount(counted, minlength=len(annotations.classes)).tolist()
    per_class, curves, found = [], {}, []
    for c, name in enumerate(annotations.classes):
        row = {"name": name, "objects": objects[c], **_summary(None)}
        if objects[c]:
            hits, misses = true[:, labels == c].cumsum(1), false[:, labels == c].cumsum(1)  # (T, D)
            recall, precision = hits / objects[c], hits / np.maximum(hits + misses, 1)
            found.append(np.array([average_precision(r, p, rule) for r, p in zip(recall, precision, strict=True)]))
            row |= _summary(found[-1])
            curves[name] = (recall[0], precision[0], row["AP50"])
        per_class.append(row)
    return {"metric": metric, "images": len(annotations.records), **_summary(np.mean(found, axis=0) if found else None),
            "per_class": per_class, "curves": curves}


def _summary(values: np.ndarray | None) -> dict[str, Any]:
    """AP, AP50, AP75 and per_iou from those at the ten IoU thresholds, (10,) or None."""
    if values is None:
        return dict.fromkeys(("AP", "AP50", "AP75", "per_iou"))
    return {"AP": float(values.mean()), "AP50": float(values[0]), "AP75": float(values[5]), "per_iou": values.tolist()}
