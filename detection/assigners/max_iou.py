"""Assignment by the largest IoU with fixed thresholds (Ren et al., Faster R-CNN, NeurIPS 2015)."""

import torch

from detection.geometry.boxes import EPS, in_chunks, iou, pairs

BACKGROUND, IGNORED = -1, -2  # what an anchor is matched to that is assigned to no object


def max_iou(anchor_boxes: torch.Tensor, boxes: torch.Tensor, image_of: torch.Tensor, valid: torch.Tensor,
            positive: float, negative: float, low_quality: bool = True) -> torch.Tensor:
    """Match the anchors of a batch to its objects, all images at once.

    anchor_boxes: (A, 4), any number of anchors a location. boxes: (T, 4). image_of: (T,) int64 their images. valid:
    (N, A) bool. positive, negative: thresholds of the IoU. Returns (N, A) int64: the object that an anchor is assigned
    to, BACKGROUND, or IGNORED.

    An anchor takes the object of its image with which its IoU is largest, of equal ones the first, if that IoU is at
    least `positive`; it is background where it is below `negative`, and ignored between the two. With `low_quality`
    each object also gets all the anchors whose IoU with it no other anchor exceeds, however small (but at least EPS);
    one that is the best for several takes the last of them."""
    best = anchor_boxes.new_zeros(valid.shape)
    matched, forced = (torch.full(valid.shape, BACKGROUND, dtype=torch.int32, device=boxes.device) for _ in range(2))
    objects = torch.arange(len(boxes), dtype=torch.int32, device=boxes.device)
    for some, images, numbers in in_chunks(len(anchor_boxes), boxes, image_of, objects):
        columns = images[:, None].expand(-1, len(anchor_boxes))  # (G, A) the image of each pair
        numbers = numbers[:, None].expand_as(columns)
        overlaps = iou(*pairs(some, anchor_boxes)) * valid[images]  # (G, A)
        before, best = best, best.scatter_reduce(0, columns, overlaps, "amax")
        first = torch.full_like(matched, len(boxes)).scatter_reduce_(
            0, columns, torch.where(overlaps < best[images], len(boxes), numbers), "amin")
        matched = torch.where(best > before, first, matched)
        if low_quality:
            largest = overlaps.amax(dim=1, keepdim=True).clamp(min=EPS)
            forced.scatter_reduce_(0, columns, torch.where(overlaps < largest, BACKGROUND, numbers), "amax")
    matched = torch.where(best >= positive, matched, torch.where(best < negative, BACKGROUND, IGNORED))
    return torch.where(forced > BACKGROUND, forced, matched).masked_fill(~valid, BACKGROUND).long()
