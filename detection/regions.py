"""Where to distil: which anchors of an image a student is to imitate its teacher at. N images, A anchors of all levels,
G objects; boxes are xyxy in pixels."""

import torch

from detection.boxes import centre_distance, iof, iou, pairs

VLR_METRICS = ("diou", "iof_parity")
CHUNK = 128  # objects compared with all anchors at a time: a (1000, 22400) matrix is 90 MB, and there are many of them
GENERAL_INSTANCES = 10  # on each level of each image
GENERAL_INSTANCE_OVERLAP = 0.3  # IoU above which a better instance suppresses another


def valuable_region(anchor_boxes, boxes, thresholds, valid, gamma=0.25, metric="diou"):
    """The valuable localization region (VLR) of an image, as the weights v_a of its anchors, (A,) in 0..1 and 0 outside
    (Zheng et al., Localization Distillation, CVPR 2022, algorithm 1).

    anchor_boxes: (A, 4). boxes: (G, 4), none for all zeros. thresholds: (G,) the objects' ATSS thresholds t_g. valid:
    (A,) bool. gamma: 0..1, how far down the region reaches.
    An anchor is in the region of object g where gamma * t_g <= DIoU(a, g) < t_g, and v_a is its largest IoU with the
    objects in whose region it is. Positives of another object, or of the same one, are not taken out.

    metric: `diou` is the paper's formula; `iof_parity` compares |a & g| / |a| - rho^2 / c^2, as the released code does,
    so that small anchors on the border of a large object come in. Raises ValueError for another metric."""
    if metric not in VLR_METRICS:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(VLR_METRICS)}")
    weights = anchor_boxes.new_zeros(len(anchor_boxes))
    if len(boxes) == 0:
        return weights
    for some, limits in zip(boxes.split(CHUNK), thresholds[:, None].split(CHUNK), strict=True):
        objects, anchors = pairs(some, anchor_boxes)
        overlap = iou(anchors, objects)  # (G, A)
        share = overlap if metric == "diou" else iof(anchors, objects)
        closeness = share - centre_distance(anchors, objects)
        region = (closeness >= gamma * limits) & (closeness < limits) & valid
        weights = torch.maximum(weights, overlap.masked_fill(~region, 0).amax(dim=0))
    return weights


# ---- regions of feature imitation ------------------------------------------------------------------------------------


def inside_boxes(centres, boxes):
    """(A,) bool: whether an anchor's centre (A, 2) lies strictly inside any of the boxes (G, 4)."""
    inside = torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
    for some in boxes.split(CHUNK):
        objects, points = pairs(some, centres)
        inside |= ((points > objects[..., :2]) & (points < objects[..., 2:])).all(dim=-1).any(dim=0)
    return inside


def finegrained(anchor_boxes, boxes, valid):
    """(A,) bool: the valid anchors whose IoU with some object exceeds half of the largest IoU that any valid anchor, of
    whatever level, has with it (Wang et al., Distilling Object Detectors with Fine-grained Feature Imitation, CVPR
    2019). anchor_boxes: (A, 4). boxes: (G, 4). valid: (A,) bool."""
    region = torch.zeros_like(valid)
    for some in boxes.split(CHUNK):
        objects, anchors = pairs(some, anchor_boxes)
        overlap = iou(anchors, objects) * valid  # (G, A)
        region |= (overlap > 0.5 * overlap.amax(dim=1, keepdim=True)).any(dim=0)
    return region


@torch.no_grad()
def general_instances(student_scores, student_boxes, teacher_scores, teacher_boxes, valid, counts):
    """(N, A) bool: the general instances (GI) of each image, where student and teacher disagree most (Dai et al.,
    General Instance Distillation for Object Detection, CVPR 2021).

    student_scores, teacher_scores: (N, A, C) in 0..1. student_boxes, teacher_boxes: (N, A, 4) decoded boxes. valid:
    (N, A) bool. counts: [anchors of each level], their sum is A.
    The GI score of an anchor is its largest difference of a class's scores, its GI box that of whichever of the two is
    surer of this class. Each level of each image keeps the first GENERAL_INSTANCES that class-agnostic NMS lets
    through; images never suppress one another."""
    difference = teacher_scores - student_scores  # (N, A, C)
    scores, classes = difference.abs().max(dim=2)
    teacher_is_surer = difference.gather(2, classes[..., None]) >= 0  # (N, A, 1)
    boxes = torch.where(teacher_is_surer, teacher_boxes, student_boxes)
    scores = scores.masked_fill(~valid, -1.0)
    levels = zip(boxes.split(counts, dim=1), scores.split(counts, dim=1), strict=True)
    return torch.cat([first_after_nms(*level, GENERAL_INSTANCES, GENERAL_INSTANCE_OVERLAP) for level in levels], dim=1)


def first_after_nms(boxes, scores, count, limit):
    """(N, P) bool: the first `count` boxes that greedy non-maximum suppression of each row keeps.

    boxes: (N, P, 4). scores: (N, P), negative for boxes that do not take part. limit: a box is suppressed by one of a
    higher score if their IoU exceeds it. As few are kept of many, taking the best one `count` times is far less work
    than NMS, and all rows go at once."""
    rows = torch.arange(len(boxes), device=boxes.device)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(min(count, scores.shape[1])):
        score, best = scores.max(dim=1)  # (N,)
        kept[rows, best] |= score >= 0
        suppressed = iou(boxes, boxes[rows, best][:, None]) > limit  # (N, P)
        suppressed[rows, best] = True  # a box without area has an IoU of 0 even with itself
        scores = scores.masked_fill(suppressed, -1.0)
    return kept
