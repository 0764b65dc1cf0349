"""The losses of PAA (Kim and Lee, ECCV 2020) and LAD (Nguyen et al., WACV 2022) towards annotations."""

import torch
import torch.nn.functional as F

from detection.assigners.targets import Targets
from detection.geometry.anchors import Anchors
from detection.geometry.boxes import giou, iou
from detection.losses.focal import focal_loss, focal_loss_of_probabilities
from detection.losses.reduction import mean_over_processes
from detection.network.paa_head import Outputs

BOX_WEIGHT = 1.3  # of the GIoU loss, in the sum of the losses and in the costs that anchors are assigned by
EPS = 1e-12  # the least sum of weights


def class_losses(outputs: Outputs, labels: torch.Tensor, place: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
    """The focal loss of each anchor, summed over the classes, (N, A); with `place`, indices of images (P,) and anchors
    (P,), that of those alone, (P,). labels: (N, A) or (P,) int64 in 0..C, C for background."""
    loss, scores = ((focal_loss, outputs.logits) if outputs.probabilities is None
                    else (focal_loss_of_probabilities, outputs.probabilities))
    return loss(scores if place is None else scores[place], labels)


def paa_losses(outputs: Outputs, targets: Targets, anchors: Anchors, weighted: bool) -> dict[str, torch.Tensor]:
    """The unweighted losses on a batch, {name: scalar}. N images, P positive anchors.

        cls  sum_a FL_a / max(P, N)                      over all anchors
        box  sum_a IoU_a (1 - GIoU_a) / sum_a IoU_a      over the positives; without `weighted` their mean
        iou  sum_a BCE(iou_a, IoU_a) / P                 over the positives, if the head predicts the IoU

    IoU_a and GIoU_a are between the decoded box of an anchor and its object; no gradient passes through the IoU.
    Divisors are means over the processes. Without positives `box` and `iou` are 0."""
    image, anchor = targets.positives
    boxes, wanted = outputs.boxes_of(anchors, image, anchor), targets.boxes[image, anchor]
    overlaps = iou(boxes.detach(), wanted)  # (P,)
    weights = overlaps.clamp(min=EPS) if weighted else torch.ones_like(overlaps)
    positives = mean_over_processes(overlaps.new_full((), len(image)))
    by_anchor = class_losses(outputs, targets.labels) * targets.valid
    losses = {"cls": by_anchor.sum() / positives.clamp(min=len(targets.labels)),
              "box": (weights * (1 - giou(boxes, wanted))).sum() / mean_over_processes(weights.sum()).clamp(min=EPS)}
    if outputs.iou_logits is not None:
        errors = F.binary_cross_entropy_with_logits(outputs.iou_logits[image, anchor], overlaps, reduction="sum")
        losses["iou"] = errors / positives.clamp(min=EPS)
    return losses
