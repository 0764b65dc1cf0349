"""Localization Distillation (LD: Zheng et al., CVPR 2022) of the distance distributions, and distillation of the
classification (KD), from a frozen teacher.

The losses are functions of the outputs of both networks, which saw the same images, and of the targets. No gradient
reaches the teacher. Where there is nothing to distil a loss is 0, and so is its gradient. N images, A anchors of all
levels."""

from typing import Any

import torch

from detection.assigners.targets import Targets
from detection.distillers.divergence import divergence, shares_of_level_means
from detection.distillers.regions import valuable_region
from detection.geometry.anchors import Anchors
from detection.losses.gfl import confidence
from detection.losses.reduction import mean_over_processes
from detection.network.gfl_head import Outputs

LD_NORMS = ("none", "avg_factor")
VLR_NORM = 16  # what the released code divides the valuable region's sum by, where the main region's is divided by 4


def ld_losses(student: Outputs, teacher: Outputs, targets: Targets, anchors: Anchors,
              settings: Any) -> dict[str, torch.Tensor]:
    """The unweighted losses of LD on a batch, {name: scalar}. KL is divergence.mean_kl, e an edge of the box, sums run
    over the whole batch.

        ld_main  sum_{a in M} w_a sum_e KL(edges_ae) / 4      M: the main region, the positive anchors
        ld_vlr   sum_{a in V} v_a sum_e KL(edges_ae) / 16     V: regions.valuable_region
        kd_main  sum_levels mean_{a in M of the level} KL(logits_a)
        kd_vlr   sum_levels mean_{a in V of the level} KL(logits_a)

    w_a is the student's highest class score, v_a the IoU with the object; KL(logits) is between softmaxes over the
    classes, though the detector scores each class by itself. A term whose weight (settings.lambda_ld_main, ...) is 0
    is neither computed nor returned: self-distillation (the teacher is a trained copy of the student) is ld_main alone.

    student, teacher: Outputs. targets: Targets. anchors: Anchors. settings: LDSettings, of which gamma and vlr_metric
    are those of regions.valuable_region.
    ld_norm: `none` leaves ld_main and ld_vlr sums, which is what the published weights are tuned for: they grow with
    the number of images in a batch, of which the authors advise at most 3 a process. `avg_factor` divides both by
    W = sum_{a in M} w_a, as GFL's box losses, and needs other weights, about 0.25 times the usual W. W is the mean
    over the processes, and at least 1, since V may hold anchors where M holds none. All other sums and means are those
    of each process, as in the released code: with gradients averaged over processes, the weights are right for the
    images that ONE process has.
    Raises ValueError for another ld_norm or vlr_metric."""
    if settings.ld_norm not in LD_NORMS:
        raise ValueError(f"ld_norm {settings.ld_norm!r}: expected one of {', '.join(LD_NORMS)}")
    normalised = settings.ld_norm == "avg_factor"
    with torch.no_grad():
        if settings.lambda_ld_main or normalised:
            confident = confidence(student.scores) * targets.positive  # (N, A)
        if settings.lambda_ld_vlr or settings.lambda_kd_vlr:
            valuable = valuable_region(anchors.boxes, targets.gt_boxes, targets.image_of, targets.thresholds,
                                       targets.valid, settings.gamma, settings.vlr_metric)  # (N, A)
        total = mean_over_processes(confident.sum()).clamp(min=1) if normalised else 1
    edges = student.edges, teacher.edges
    logits = student.logits[:, :, None], teacher.logits[:, :, None]  # K = 1, where edges have 4
    losses = {}
    if settings.lambda_ld_main:
        losses["ld_main"] = divergence(*edges, confident, settings.ld_temperature) / 4 / total
    if settings.lambda_ld_vlr:
        losses["ld_vlr"] = divergence(*edges, valuable, settings.ld_temperature) / VLR_NORM / total
    if settings.lambda_kd_main:
        shares = shares_of_level_means(targets.positive, anchors)
        losses["kd_main"] = divergence(*logits, shares, settings.kd_temperature)
    if settings.lambda_kd_vlr:
        shares = shares_of_level_means(valuable > 0, anchors)
        losses["kd_vlr"] = divergence(*logits, shares, settings.kd_temperature)
    return losses
