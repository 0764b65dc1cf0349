"""Where to distil: at which anchors of a batch a student is to imitate its teacher. N images, A anchors of all levels,
T objects of all images together; boxes are xyxy in pixels."""

import torch

from detection.geometry.boxes import centre_distance, centres, distances, in_chunks, iof, iou, pairs

VLR_METRICS = ("diou", "iof_parity")
GENERAL_INSTANCES = 10  # on each level of each image
GENERAL_INSTANCE_OVERLAP = 0.3  # IoU above which a better instance suppresses another


def valuable_region(anchor_boxes: torch.Tensor, boxes: torch.Tensor, image_of: torch.Tensor, thresholds: torch.Tensor,
                    valid: torch.Tensor, gamma: float = 0.25, metric: str = "diou",
                    interior: bool = False) -> torch.Tensor:
    """The valuable localization region (VLR) of each image, as the weights v_a of its anchors, (N, A) in 0..1 and 0
    outside (Zheng et al., Localization Distillation, CVPR 2022, algorithm 1).

    anchor_boxes: (A, 4). boxes: (T, 4) the objects. image_of: (T,) their images. thresholds: (T,) their ATSS thresholds
    t_g. valid: (N, A) bool. gamma: 0..1, how far down the region reaches.
    An anchor is in the region of object g where gamma * t_g <= DIoU(a, g) < t_g, and v_a is its largest IoU with the
    objects in whose region it is. Positives of another object, or of the same one, are not taken out. interior: only
    where the anchor's centre lies strictly inside the object, too.

    metric: `diou` is the paper's formula; `iof_parity` compares |a & g| / |a| - rho^2 / c^2, as the released code does,
    so that small anchors on the border of a large object come in. Raises ValueError for another metric."""
    if metric not in VLR_METRICS:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(VLR_METRICS)}")
    weights = anchor_boxes.new_zeros(valid.shape)
    for some, images, limits in in_chunks(len(anchor_boxes), boxes, image_of, thresholds[:, None]):
        objects, anchors = pairs(some, anchor_boxes)
        overlap = iou(anchors, objects)  # (G, A)
        share = overlap if metric == "diou" else iof(anchors, objects)
        closeness = share - centre_distance(anchors, objects)
        region = (closeness >= gamma * limits) & (closeness < limits)
        if interior:
            region &= distances(centres(anchors), objects).amin(dim=-1) > 0
        largest_by_image(weights, overlap.masked_fill(~region, 0), images)
    return weights * valid


def merged_region(anchor_boxes: torch.Tensor, boxes: torch.Tensor, image_of: torch.Tensor, thresholds: torch.Tensor,
                  valid: torch.Tensor, gamma: float = 0.25) -> torch.Tensor:
    """Main and valuable region in one, as the weights r_a of the anchors of each image, (N, A) in 0..1 and 0 outside
    (Rotated-LD: Zheng et al., arXiv:2204.05957). An anchor is in the region of object g where gamma * t_g <= IoU(a, g),
    and r_a is its largest IoU with these. Arguments as of `valuable_region`."""
    weights = anchor_boxes.new_zeros(valid.shape)
    for some, images, limits in in_chunks(len(anchor_boxes), boxes, image_of, thresholds[:, None]):
        objects, anchors = pairs(some, anchor_boxes)
        overlap = iou(anchors, objects)  # (G, A)
        largest_by_image(weights, overlap.masked_fill(overlap < gamma * limits, 0), images)
    return weights * valid


def largest_by_image(found: torch.Tensor, values: torch.Tensor, image_of: torch.Tensor) -> None:
    """Raise `found` (N, A), in place, to the largest of the `values` (G, A) of the objects of each image (G,)."""
    found.scatter_reduce_(0, image_of[:, None].expand_as(values), values, "amax")


# ---- regions of feature imitation ------------------------------------------------------------------------------------


def inside_boxes(centres: torch.Tensor, boxes: torch.Tensor, image_of: torch.Tensor,
                 valid: torch.Tensor) -> torch.Tensor:
    """(N, A) bool: the valid anchors whose centre (A, 2) lies strictly inside any of the boxes (T, 4) of its image.
    image_of: (T,). valid: (N, A) bool."""
    inside = centres.new_zeros(valid.shape)
    for some, images in in_chunks(len(centres), boxes, image_of):
        objects, points = pairs(some, centres)
        found = ((points > objects[..., :2]) & (points < objects[..., 2:])).all(dim=-1)  # (G, A)
        largest_by_image(inside, found.float(), images)
    return (inside > 0) & valid


def finegrained(anchor_boxes: torch.Tensor, boxes: torch.Tensor, image_of: torch.Tensor,
                valid: torch.Tensor) -> torch.Tensor:
    """(N, A) bool: the valid anchors whose IoU with some object of their image exceeds half of the largest IoU that any
    valid anchor, of whatever level, has with it (Wang et al., Distilling Object Detectors with Fine-grained Feature
    Imitation, CVPR 2019). anchor_boxes: (A, 4). boxes: (T, 4). image_of: (T,). valid: (N, A) bool."""
    region = anchor_boxes.new_zeros(valid.shape)
    for some, images in in_chunks(len(anchor_boxes), boxes, image_of):
        objects, anchors = pairs(some, anchor_boxes)
        overlap = iou(anchors, objects) * valid[images]  # (G, A)
        largest_by_image(region, (overlap > 0.5 * overlap.amax(dim=1, keepdim=True)).float(), images)
    return region > 0


@torch.no_grad()
def general_instances(student_scores: torch.Tensor, student_boxes: torch.Tensor, teacher_scores: torch.Tensor,
                      teacher_boxes: torch.Tensor, valid: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(N, A) bool: the general instances (GI) of each image, where student and teacher disagree most (Dai et al.,
    General Instance Distillation for Object Detection, CVPR 2021).

    student_scores, teacher_scores: (N, A, C) in 0..1. student_boxes, teacher_boxes: (N, A, 4) decoded boxes. valid:
    (N, A) bool. counts: [anchors of each level], their sum is A.
    The GI score of an anchor is its largest difference of a class's scores, its GI box that of whichever of the two is
    scores this class higher. Each level of each image keeps the first GENERAL_INSTANCES that class-agnostic NMS lets
    through; images never suppress one another."""
    difference = teacher_scores - student_scores  # (N, A, C)
    scores, classes = difference.abs().max(dim=2)
    teacher_is_higher = difference.gather(2, classes[..., None]) >= 0  # (N, A, 1)
    boxes = torch.where(teacher_is_higher, teacher_boxes, student_boxes)
    scores = scores.masked_fill(~valid, -1.0)
    levels = zip(boxes.split(counts, dim=1), scores.split(counts, dim=1), strict=True)
    return torch.cat([first_after_nms(*level, GENERAL_INSTANCES, GENERAL_INSTANCE_OVERLAP) for level in levels], dim=1)


def first_after_nms(boxes: torch.Tensor, scores: torch.Tensor, count: int, limit: float) -> torch.Tensor:
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
