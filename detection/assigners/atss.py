"""Adaptive training sample selection (ATSS, Zhang et al., CVPR 2020) assigns anchors to objects."""

import torch

from detection.assigners.targets import GroundTruth, Targets, targets_of_matches
from detection.geometry.anchors import Anchors, valid_anchors
from detection.geometry.boxes import centres, distances, iou

TOPK = 9  # candidates of an object on each level
INSIDE = 0.01  # pixels by which the centre of a positive anchor is inside its object, at least
PAIRS = 2**23  # distances held at once: 34 MB


def assign_by_atss(anchors: Anchors, truth: GroundTruth) -> Targets:
    """The Targets of a batch. anchors: Anchors. truth: GroundTruth, on their device."""
    valid = valid_anchors(anchors, truth.image_sizes)
    matched, thresholds = atss(anchors, truth.boxes, truth.image_of, valid)
    return targets_of_matches(matched, valid, thresholds, truth)


def atss(anchors: Anchors, boxes: torch.Tensor, image_of: torch.Tensor,
         valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Match the anchors of a batch to its objects, all images at once.

    anchors: Anchors. boxes: (T, 4) objects in pixels. image_of: (T,) int64 their images. valid: (N, A) bool.
    Returns matched (N, A) int64, the object that an anchor is assigned to or -1; and the objects' thresholds (T,).

    The candidates of an object are the TOPK anchors of each level whose centres lie nearest to its own; its threshold
    is mean + standard deviation (of a sample) of their IoU with it. Positive are the candidates at least as good as
    the threshold whose centre lies in the object; one that is positive for several takes that of the largest IoU, and
    of equal ones the first."""
    matched = torch.full(valid.shape, len(boxes), device=boxes.device)
    if len(boxes) == 0:
        return matched - 1, boxes.new_zeros(0)
    candidates, taken, overlaps, thresholds = atss_candidates(anchors, boxes, image_of, valid)
    inside = distances(anchors.centres[candidates], boxes[:, None]).amin(dim=-1) > INSIDE
    positive = taken & inside & (overlaps >= thresholds[:, None])
    # The anchors of all images in one row; what is not positive goes to a place after its end.
    places = (image_of[:, None] * valid.shape[1] + candidates).masked_fill(~positive, valid.numel()).flatten()
    best = overlaps.new_zeros(valid.numel() + 1).scatter_reduce_(0, places, overlaps.flatten(), "amax")
    is_best = positive & (overlaps == best[places].view_as(overlaps))
    objects = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(candidates)
    places = places.masked_fill(~is_best.flatten(), valid.numel())
    matched = torch.cat([matched.flatten(), matched.new_zeros(1)])
    matched = matched.scatter_reduce_(0, places, objects.flatten(), "amin")[:-1].view(valid.shape)
    return matched.masked_fill(matched == len(boxes), -1), thresholds


def atss_candidates(anchors: Anchors, boxes: torch.Tensor, image_of: torch.Tensor,
                    valid: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The candidates of the objects, (T, K) int64 and bool, see `nearest`; their IoUs (T, K); and the thresholds (T,),
    mean + standard deviation of these. Arguments as of `atss`."""
    rows = max(1, PAIRS // len(anchors.boxes))
    found = [nearest(anchors, *part, valid) for part in zip(boxes.split(rows), image_of.split(rows), strict=True)]
    candidates, taken = (torch.cat(parts) for parts in zip(*found, strict=True))  # (T, K) each
    overlaps = iou(anchors.boxes[candidates], boxes[:, None]) * taken  # (T, K)
    count = taken.sum(dim=1)
    mean = overlaps.sum(dim=1) / count.clamp(min=1)
    squares = ((overlaps - mean[:, None]).square() * taken).sum(dim=1)
    return candidates, taken, overlaps, mean + (squares / (count - 1).clamp(min=1)).sqrt()


def nearest(anchors: Anchors, boxes: torch.Tensor, image_of: torch.Tensor,
            valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates of objects: (G, K) int64 anchors, up to TOPK of each level, and (G, K) bool, which of them lie on
    the object's image: a level may have fewer."""
    apart = torch.cdist(centres(boxes), anchors.centres, compute_mode="donot_use_mm_for_euclid_dist")  # (G, A)
    apart = apart.masked_fill(~valid[image_of], torch.inf)
    candidates, taken, start = [], [], 0
    for level in apart.split(anchors.counts, dim=1):
        least = level.topk(min(TOPK, level.shape[1]), dim=1, largest=False)
        candidates.append(least.indices + start)
        taken.append(least.values < torch.inf)
        start += level.shape[1]
    return torch.cat(candidates, dim=1), torch.cat(taken, dim=1)
