"""Generalized Focal Loss (GFL: Li et al., NeurIPS 2020). A term of the paper is a function of its name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from detection.assigners.targets import Targets
from detection.geometry.anchors import Anchors
from detection.geometry.boxes import boxes_at, ciou, distances, expected_distances, giou, iou
from detection.losses.reduction import mean_over_processes
from detection.network.gfl_head import Outputs

BETA = 2.0  # exponent of the quality focal loss
BOX_LOSSES = {"giou": giou, "ciou": ciou}


def quality_focal_loss(logits: torch.Tensor, labels: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """QFL (GFL, eq. 1): |q - sigmoid(z)|^2 * BCE(z, q), summed over the classes.

    logits: (M, C). labels: (M,) int64 in 0..C, C for background. quality: (M,) the target q in 0..1 at the label's
    class; every other class's is 0. Returns (M,)."""
    return _quality_focal(logits.sigmoid(), F.binary_cross_entropy_with_logits, logits, labels, quality)


def quality_focal_loss_of_probabilities(probabilities: torch.Tensor, labels: torch.Tensor,
                                        quality: torch.Tensor) -> torch.Tensor:
    """QFL of scores (M, C) in 0..1, as GFocal V2 has them (Li et al., CVPR 2021). Else as quality_focal_loss."""
    return _quality_focal(probabilities, F.binary_cross_entropy, probabilities, labels, quality)


def _quality_focal(probabilities: torch.Tensor, cross_entropy: Callable[..., torch.Tensor], values: torch.Tensor,
                   labels: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    target = values.new_zeros(len(values), values.shape[1] + 1)
    target = target.scatter_(1, labels[:, None], quality[:, None].to(target.dtype))[:, :-1]  # (M, C)
    return ((target - probabilities).abs() ** BETA * cross_entropy(values, target, reduction="none")).sum(dim=1)


def distribution_focal_loss(edges: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """DFL (GFL, eq. 6): cross-entropy towards the two bins around each target, weighted by how near they are.

    edges: (M, R + 1) logits. targets: (M,) in 0 <= y < R, in units of the stride. Returns (M,)."""
    below = targets.floor()
    log_q = edges.log_softmax(dim=1)
    left, right = (log_q.gather(1, index[:, None].long()).squeeze(1) for index in (below, below + 1))
    return -(below + 1 - targets) * left - (targets - below) * right


def gfl_losses(outputs: Outputs, targets: Targets, anchors: Anchors, box_loss: str = "giou") -> dict[str, torch.Tensor]:
    """The unweighted losses of a GFL detector on a batch, {name: scalar}: `qfl` of the classes, `box` and `dfl`.

    outputs: Outputs. targets: Targets. anchors: Anchors. box_loss: giou, or ciou (the published
    recipe on VOC). The quality of a positive is the IoU of its decoded box with its object; its box losses are weighted
    by its highest class score w_a. `qfl` is divided by the number of positives, the box losses by the sum of w_a,
    both as means over the processes."""
    logits, edges = outputs.logits, outputs.edges
    image, anchor = targets.positives
    strides = anchors.strides[anchor, None]  # (P, 1)
    points, wanted = anchors.centres[anchor] / strides, targets.boxes[image, anchor] / strides
    positive_edges = edges[image, anchor]  # (P, 4, R + 1)
    decoded = boxes_at(points, expected_distances(positive_edges))  # (P, 4), in units of the stride
    quality = logits.new_zeros(logits.shape[:2])  # (N, A)
    quality[image, anchor] = iou(decoded.detach(), wanted)
    scores = outputs.scores
    if outputs.quality is None:
        by_anchor = quality_focal_loss(logits.flatten(0, 1), targets.labels.flatten(), quality.flatten())
    else:
        by_anchor = quality_focal_loss_of_probabilities(scores.flatten(0, 1), targets.labels.flatten(),
                                                        quality.flatten())
    positives = targets.positive.sum(dim=1).clamp(min=1).sum().float()
    weights = confidence(scores[image, anchor])  # (P,)
    total_weight = mean_over_processes(weights.sum()) + 1e-6
    by_box = 1 - BOX_LOSSES[box_loss](decoded, wanted)
    last_bin = edges.shape[-1] - 1
    wanted_distances = distances(points, wanted, last_bin - 0.1)  # (P, 4)
    by_edge = distribution_focal_loss(positive_edges.flatten(0, 1), wanted_distances.flatten()).view(-1, 4)
    return {
        "qfl": (by_anchor * targets.valid.flatten()).sum() / mean_over_processes(positives).clamp(min=1),
        "box": (by_box * weights).sum() / total_weight,
        "dfl": (by_edge.mean(dim=1) * weights).sum() / total_weight,
    }


def confidence(scores: torch.Tensor) -> torch.Tensor:
    """w_a: an anchor's highest class score, (..., C) -> (...), a weight without gradient."""
    return scores.detach().amax(dim=-1)
