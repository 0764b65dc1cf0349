"""Rotated-LD: localization distillation of oriented boxes (Zheng et al., Localization Distillation for Object
Detection, arXiv:2204.05957), and distillation of the classification, from a frozen teacher. No gradient reaches the
teacher."""

from typing import Any

import torch

from detection.assigners.atss import atss_candidates
from detection.assigners.targets import Targets
from detection.distillers.divergence import divergence, shares_of_level_means
from detection.distillers.regions import merged_region
from detection.geometry.anchors import Anchors
from detection.geometry.oriented import circumscribed, upright
from detection.network.rotated_head import RotatedOutputs

REGION_BOXES = {"circumscribed": circumscribed, "upright": upright}


def rotated_ld_losses(student: RotatedOutputs, teacher: RotatedOutputs, targets: Targets, anchors: Anchors,
                      settings: Any) -> dict[str, torch.Tensor]:
    """The unweighted losses of Rotated-LD on a batch, {name: scalar}. KL is divergence.mean_kl, b one of the five
    deltas of a box, the angle's as the four others'; n_l is the number of anchors of level l with r_a > 0 in the batch.

        ld  sum_l 1 / n_l sum_{a of level l} r_a sum_b KL(bins_ab)
        kd  sum_l 1 / n_l sum_{a of level l} r_a KL(logits_a)

    r_a are the weights of regions.merged_region. A term whose weight (settings.lambda_ld, settings.lambda_kd) is 0 is
    neither computed nor returned.

    student, teacher: RotatedOutputs. targets: Targets. anchors: Anchors. settings: RotatedLDSettings, of which gamma is
    that of regions.merged_region. region_boxes: the horizontal boxes of the objects that the region is made with,
    `circumscribed`, or `upright`, w x h whatever the angle, as the released code does."""
    with torch.no_grad():
        boxes = REGION_BOXES[settings.region_boxes](targets.gt_boxes)
        *_, thresholds = atss_candidates(anchors, boxes, targets.image_of, targets.valid)
        region = merged_region(anchors.boxes, boxes, targets.image_of, thresholds, targets.valid, settings.gamma)
        weights = region * shares_of_level_means(region > 0, anchors)  # (N, A)
    losses = {}
    if settings.lambda_ld:
        losses["ld"] = divergence(student.bins, teacher.bins, weights, settings.temperature)
    if settings.lambda_kd:
        losses["kd"] = divergence(student.logits[:, :, None], teacher.logits[:, :, None], weights,
                                  settings.temperature)
    return losses
