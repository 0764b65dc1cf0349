"""Imitation of the teacher's features, at the locations that a method selects."""

from collections.abc import Sequence

import torch

from detection.assigners.targets import Targets
from detection.distillers.divergence import shares_of_level_means
from detection.distillers.regions import finegrained, general_instances, inside_boxes
from detection.geometry.anchors import Anchors
from detection.network.gfl_head import Outputs

IMITATIONS = ("fitnet", "fitnet_full", "decouple", "finegrained", "gibox")
BACKGROUND_WEIGHT = 2.0  # of `decouple`


def imitation_loss(method: str, student: Outputs, teacher: Outputs, targets: Targets, anchors: Anchors) -> torch.Tensor:
    """The sum over the levels of the MSE of student's and teacher's features, a scalar: on each level the mean over the
    channels of the locations that `method` selects in the whole batch. A level without a positive anchor counts 0.

    student, teacher: Outputs, whose features have as many channels. targets: Targets. anchors: Anchors. method, one of
    IMITATIONS; locations outside an image, in the padding of the batch, are never selected:
        fitnet       centre inside an object. The released code of LD has this name for it; its tables say inside GT box
        fitnet_full  every location (Romero et al., FitNets, ICLR 2015)
        decouple     inside an object, plus BACKGROUND_WEIGHT times the MSE of all other locations (Guo et al., DeFeat,
                     CVPR 2021)
        finegrained  near an object: regions.finegrained
        gibox        where student and teacher disagree most: regions.general_instances"""
    region = imitation_region(method, student, teacher, targets, anchors)
    on_level = anchors.levels.new_zeros(len(anchors.sizes))
    on_level.index_add_(0, anchors.levels, targets.positive.sum(dim=0))
    possible = targets.valid & (on_level > 0)[anchors.levels]  # (N, A)
    # A location is selected where any of its K anchors is.
    region, possible = (mask.unflatten(1, (-1, anchors.per_location)).any(dim=2) for mask in (region, possible))
    locations = anchors.locations
    shares = shares_of_level_means(region & possible, locations)  # (N, L)
    if method == "decouple":
        shares = shares + BACKGROUND_WEIGHT * shares_of_level_means(~region & possible, locations)
    return feature_error(student.features, teacher.features, shares)


def imitation_region(method: str, student: Outputs, teacher: Outputs, targets: Targets,
                     anchors: Anchors) -> torch.Tensor:
    """(N, A) bool: the locations that `method` selects; for `decouple` those inside an object. Raises ValueError for a
    method that is none of IMITATIONS."""
    if method in ("fitnet", "decouple"):
        return inside_boxes(anchors.centres, targets.gt_boxes, targets.image_of, targets.valid)
    if method == "fitnet_full":
        return targets.valid
    if method == "finegrained":
        return finegrained(anchors.boxes, targets.gt_boxes, targets.image_of, targets.valid)
    if method == "gibox":
        with torch.no_grad():
            return general_instances(student.scores, student.boxes(anchors), teacher.scores, teacher.boxes(anchors),
                                     targets.valid, anchors.counts)
    raise ValueError(f"method {method!r}: expected one of {', '.join(IMITATIONS)}")


def feature_error(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor],
                  shares: torch.Tensor) -> torch.Tensor:
    """sum_i share_i times the mean squared difference of the channels at location i, a scalar.

    student, teacher: [(N, channels, H_l, W_l)]. shares: (N, L), L the locations of all levels. Only the locations with
    a share are compared, which are few of many."""
    total, start = 0, 0
    for ours, theirs in zip(student, teacher, strict=True):
        count = ours.shape[2] * ours.shape[3]
        level = shares[:, start:start + count]
        rows = level.nonzero(as_tuple=True)
        ours, theirs = (feature.permute(0, 2, 3, 1).flatten(1, 2)[rows].float() for feature in (ours, theirs.detach()))
        total = total + ((ours - theirs).square().mean(dim=1) * level[rows]).sum()  # (P, channels) -> scalar
        start += count
    return total
