"""What a detector learns from a frozen teacher: Localization Distillation (LD: Zheng et al., CVPR 2022) of the
distance distributions, distillation of the classification (KD), and imitation of the features.

A loss is a function of the outputs of both, which saw the same images, and of the targets; it returns a dict of named
scalars, already weighted. No gradient reaches the teacher. Where there is nothing to imitate a loss is 0, and so is its
gradient. N images, A anchors of all levels."""

import torch

from common.runtime import UserError
from detection.distillers.regions import finegrained, general_instances, inside_boxes, valuable_region
from detection.losses.gfl import class_scores, confidence, decoded_boxes, mean_kl, mean_over_processes

LD_NORMS = ("none", "avg_factor")
METHODS = ("fitnet", "fitnet_full", "decouple", "finegrained", "gibox")
BACKGROUND_WEIGHT = 2.0  # of `decouple`
VLR_NORM = 16  # what the released code divides the valuable region's sum by, where the main region's is divided by 4


def ld_losses(student, teacher, targets, anchors, *, lambda_ld_main=0.25, lambda_ld_vlr=0.25, lambda_kd_main=10.0,
              lambda_kd_vlr=0.0, ld_temperature=10.0, kd_temperature=2.0, ld_norm="none", gamma=0.25,
              vlr_metric="diou"):
    """The losses of LD on a batch. KL is losses.mean_kl, e an edge of the box, sums run over the whole batch.

        ld_main  lambda * sum_{a in M} w_a sum_e KL(edges_ae) / 4      M: the main region, the positive anchors
        ld_vlr   lambda * sum_{a in V} v_a sum_e KL(edges_ae) / 16     V: regions.valuable_region
        kd_main  lambda * sum_levels mean_{a in M of the level} KL(logits_a)
        kd_vlr   lambda * sum_levels mean_{a in V of the level} KL(logits_a)

    w_a is the student's highest class score, v_a the IoU with the object; KL(logits) is between softmaxes over the
    classes, though the detector scores each class by itself. The defaults are those of the paper's main results. A term
    whose lambda is 0 is neither computed nor returned: self-distillation (the teacher is a trained copy of the student)
    is lambda_ld_main alone.

    student, teacher: detector.Outputs. targets: assignment.Targets. anchors: Anchors. gamma, vlr_metric: see
    regions.valuable_region.
    ld_norm: `none` leaves ld_main and ld_vlr sums, which is what the published lambdas are tuned for: they grow with
    the number of images in a batch, of which the authors advise at most 3 a process. `avg_factor` divides both by
    W = sum_{a in M} w_a, as GFL's box losses, and asks for other lambdas, about 0.25 times the usual W. W is the mean
    over the processes, and at least 1, since V may hold anchors where M holds none. All other sums and means are those
    of each process, as in the released code: with gradients averaged over processes, the lambdas are right for the
    images that ONE process has.
    Raises ValueError for another ld_norm or vlr_metric."""
    if ld_norm not in LD_NORMS:
        raise ValueError(f"ld_norm {ld_norm!r}: expected one of {', '.join(LD_NORMS)}")
    with torch.no_grad():
        if lambda_ld_main or ld_norm == "avg_factor":
            confident = confidence(class_scores(student)) * targets.positive  # (N, A)
        if lambda_ld_vlr or lambda_kd_vlr:
            valuable = valuable_region(anchors.boxes, targets.gt_boxes, targets.image_of, targets.thresholds,
                                       targets.valid, gamma, vlr_metric)  # (N, A)
        total = mean_over_processes(confident.sum()).clamp(min=1) if ld_norm == "avg_factor" else 1
    edges = student.edges, teacher.edges
    logits = student.logits[:, :, None], teacher.logits[:, :, None]  # K = 1, where edges have 4
    losses = {}
    if lambda_ld_main:
        losses["ld_main"] = lambda_ld_main / 4 * divergence(*edges, confident, ld_temperature) / total
    if lambda_ld_vlr:
        losses["ld_vlr"] = lambda_ld_vlr / VLR_NORM * divergence(*edges, valuable, ld_temperature) / total
    if lambda_kd_main:
        shares = shares_of_level_means(targets.positive, anchors)
        losses["kd_main"] = lambda_kd_main * divergence(*logits, shares, kd_temperature)
    if lambda_kd_vlr:
        shares = shares_of_level_means(valuable > 0, anchors)
        losses["kd_vlr"] = lambda_kd_vlr * divergence(*logits, shares, kd_temperature)
    return losses


def divergence(student, teacher, weights, temperature):
    """sum_a weight_a sum_k KL(student_ak, teacher_ak), a scalar.

    student, teacher: (N, A, K, n) logits of the K distributions that each anchor has. weights: (N, A)."""
    rows = weights.nonzero(as_tuple=True)  # few of many anchors: the others need no softmax
    kl = mean_kl(student[rows], teacher[rows], temperature)  # (P, K)
    return (weights[rows][:, None] * kl).sum()


def shares_of_level_means(region, anchors):
    """(N, A) weights such that sum(weights * values) is the sum over the levels of the values' mean over the region on
    this level, in the whole batch; a level without any of the region counts 0. region: (N, A) bool."""
    counts = anchors.levels.new_zeros(len(anchors.sizes)).index_add_(0, anchors.levels, region.sum(dim=0))
    return region / counts.clamp(min=1)[anchors.levels]


# ---- feature imitation -----------------------------------------------------------------------------------------------


def imitation_losses(method, student, teacher, targets, anchors, weight=2.0):
    """{"imitation": weight * sum over the levels of the MSE of student's and teacher's features}, the mean over the
    channels of the locations that `method` selects in the whole batch. A level without a positive anchor counts 0.

    student, teacher: detector.Outputs, whose features have as many channels. targets: assignment.Targets. anchors:
    Anchors. method, one of METHODS; locations outside an image, in the padding of the batch, are never selected:
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
    shares = shares_of_level_means(region & possible, anchors)
    if method == "decouple":
        shares = shares + BACKGROUND_WEIGHT * shares_of_level_means(~region & possible, anchors)
    return {"imitation": weight * feature_error(student.features, teacher.features, shares)}


def imitation_region(method, student, teacher, targets, anchors):
    """(N, A) bool: the locations that `method` selects; for `decouple` those inside an object. Raises ValueError for a
    method that is none of METHODS."""
    if method in ("fitnet", "decouple"):
        return inside_boxes(anchors.centres, targets.gt_boxes, targets.image_of, targets.valid)
    if method == "fitnet_full":
        return targets.valid
    if method == "finegrained":
        return finegrained(anchors.boxes, targets.gt_boxes, targets.image_of, targets.valid)
    if method == "gibox":
        with torch.no_grad():
            instances = [part for outputs in (student, teacher)
                         for part in (class_scores(outputs), decoded_boxes(outputs, anchors))]
        return general_instances(*instances, targets.valid, anchors.counts)
    raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")


def feature_error(student, teacher, shares):
    """sum_a share_a times the mean squared difference of the channels at location a, a scalar.

    student, teacher: [(N, channels, H_l, W_l)]. shares: (N, A). Only the locations with a share are compared, which are
    few of many."""
    total, start = 0, 0
    for own, other in zip(student, teacher, strict=True):
        count = own.shape[2] * own.shape[3]
        level = shares[:, start:start + count]
        rows = level.nonzero(as_tuple=True)
        own, other = (feature.permute(0, 2, 3, 1).flatten(1, 2)[rows].float() for feature in (own, other.detach()))
        total = total + ((own - other).square().mean(dim=1) * level[rows]).sum()  # (P, channels) -> scalar
        start += count
    return total


# ---- pairs of teacher and student ------------------------------------------------------------------------------------


def check_pair(student, teacher, imitation=False):
    """Raise UserError, naming the first difference, unless a student can learn from a teacher.

    student, teacher: descriptions {"classes": [names], "model": {"strides": [..], "reg_max": .., "anchor_scale": ..,
    "anchor_offset": .., "channels": ..}}. imitation: whether features are imitated, which must then have as many
    channels."""
    ours, theirs = student["classes"], teacher["classes"]
    differences = [("the number of classes", len(ours), len(theirs))]
    differences += [(f"the name of class {number}", own, other)
                    for number, (own, other) in enumerate(zip(ours, theirs, strict=False))]
    names = ["strides", "reg_max", "anchor_scale", "anchor_offset"] + ["channels"] * imitation
    differences += [(name, student["model"][name], teacher["model"][name]) for name in names]
    for what, own, other in differences:
        if own != other:
            raise UserError(f"teacher and student differ in {what}: {other!r} in the teacher, {own!r} in the student; "
                            "distillation expects the same in both")
