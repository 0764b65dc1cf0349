"""Which anchors answer for which object: adaptive training sample selection (ATSS, Zhang et al., CVPR 2020)."""

from dataclasses import dataclass

import torch

from detection.anchors import valid_anchors, valid_counts
from detection.boxes import centres, distances, iou

TOPK = 9  # candidates of an object on each level
INSIDE = 0.01  # pixels by which the centre of a positive anchor is inside its object, at least


@dataclass(frozen=True)
class Targets:
    """What every anchor of a batch is to predict. N images, A anchors, G_i objects in image i."""

    labels: torch.Tensor  # (N, A) int64 class of the matched object, num_classes for background
    boxes: torch.Tensor  # (N, A, 4) box of the matched object in pixels, zeros for background
    matched: torch.Tensor  # (N, A) int64 index of the matched object in its image, -1 for background
    valid: torch.Tensor  # (N, A) bool: whether the anchor lies on its image
    thresholds: list  # N x (G_i,) the IoU from which an anchor is positive for each object
    gt_boxes: list  # N x (G_i, 4) pixels
    gt_labels: list  # N x (G_i,) int64

    @property
    def positive(self):
        """(N, A) bool: the main region, anchors that answer for an object."""
        return self.matched >= 0


def atss(anchors, boxes, valid=None, candidates_per_level=None):
    """Match the anchors of one image to its objects.

    anchors: Anchors. boxes: (G, 4) objects in pixels. valid: (A,) bool, None for all. candidates_per_level: how many
    anchors of each level are candidates of an object, by default TOPK or as many as there are valid ones.
    Returns matched (A,) int64, the object that an anchor answers for or -1; and the objects' thresholds (G,).

    The candidates of an object are the TOPK anchors of each level whose centres lie nearest to its own; its threshold
    is mean + standard deviation (of a sample) of their IoU with it. Positive are the candidates at least as good as
    the threshold whose centre lies in the object; one that is positive for several takes that of the largest IoU."""
    count = len(anchors.boxes)
    if len(boxes) == 0:
        return boxes.new_full((count,), -1, dtype=torch.int64), boxes.new_zeros(0)
    if candidates_per_level is None:
        there = anchors.counts if valid is None else [int(part.sum()) for part in valid.split(anchors.counts)]
        candidates_per_level = [min(TOPK, number) for number in there]
    apart = torch.cdist(centres(boxes), anchors.centres, compute_mode="donot_use_mm_for_euclid_dist")  # (G, A)
    if valid is not None:
        apart = apart.masked_fill(~valid, torch.inf)
    candidates, start = [], 0
    for level, number in zip(apart.split(anchors.counts, dim=1), candidates_per_level, strict=True):
        candidates.append(level.topk(number, dim=1, largest=False).indices + start)
        start += level.shape[1]
    candidates = torch.cat(candidates, dim=1)  # (G, K)
    overlaps = iou(anchors.boxes[candidates], boxes[:, None])  # (G, K)
    spread = overlaps.std(dim=1) if overlaps.shape[1] > 1 else torch.zeros_like(overlaps[:, 0])
    thresholds = overlaps.mean(dim=1) + spread
    inside = distances(anchors.centres[candidates], boxes[:, None]).amin(dim=-1) > INSIDE
    positive = inside & (overlaps >= thresholds[:, None])
    best = torch.full((len(boxes), count), -1.0, device=boxes.device)
    best.scatter_(1, candidates, overlaps.masked_fill(~positive, -1.0))
    overlap, matched = best.max(dim=0)
    return matched.masked_fill(overlap < 0, -1), thresholds


def assign_batch(anchors, boxes, labels, image_sizes, num_classes):
    """The Targets of a batch.

    boxes, labels: N x (G_i, 4) in pixels and N x (G_i,), on the device of the anchors. image_sizes: [(height, width)]
    of the images before they were padded to the size of the batch."""
    valid = valid_anchors(anchors, image_sizes)
    all_matched, all_labels, all_boxes, thresholds = [], [], [], []
    for i, size in enumerate(image_sizes):
        numbers = [min(TOPK, rows * columns) for rows, columns in valid_counts(size, anchors)]
        matched, threshold = atss(anchors, boxes[i], valid[i], numbers)
        # One more entry, for the index -1 of the background.
        known = torch.cat([labels[i], labels[i].new_full((1,), num_classes)])
        places = torch.cat([boxes[i], boxes[i].new_zeros(1, 4)])
        all_matched.append(matched)
        all_labels.append(known[matched])
        all_boxes.append(places[matched])
        thresholds.append(threshold)
    return Targets(torch.stack(all_labels), torch.stack(all_boxes), torch.stack(all_matched), valid, thresholds,
                   list(boxes), list(labels))
