"""Soft-label distillation of a PAA detector (Nguyen et al., Improving Object Detection by Label Assignment
Distillation, WACV 2022): the student imitates the teacher's scores and boxes. What the paper's title names, that the
teacher's costs assign the anchors, is `assign_by_paa` with the teacher's outputs."""

import torch
import torch.nn.functional as F

from detection.assigners.targets import GroundTruth
from detection.distillers.regions import largest_by_image
from detection.geometry.anchors import Anchors, valid_anchors
from detection.geometry.boxes import giou, in_chunks, iou
from detection.losses.reduction import mean_over_processes
from detection.network.paa_head import Outputs

FOCUS = 0.5  # gamma: exponent by which what the student knows already loses weight
SMOOTH = 1e-6  # keeps the slope of the focal factor finite where student and teacher agree
PROBABILITIES = (1e-4, 0.9999)  # what those of IOP and COP are clamped to


def focal_kl(student: torch.Tensor, teacher: torch.Tensor, gamma: float = FOCUS) -> torch.Tensor:
    """((t - p)^2 + 1e-6)^(gamma / 2) * KL(t || p) of Bernoulli distributions, p = sigmoid(student), t =
    sigmoid(teacher), element by element. student, teacher: logits of one shape; no gradient reaches the teacher's."""
    t = teacher.detach().sigmoid()
    kl = F.binary_cross_entropy_with_logits(student, t, reduction="none") - F.binary_cross_entropy_with_logits(
        teacher.detach(), t, reduction="none")
    return focal_factor(student.sigmoid(), t, gamma) * kl


def focal_kl_of_probabilities(student: torch.Tensor, teacher: torch.Tensor, gamma: float = FOCUS) -> torch.Tensor:
    """The same of probabilities in 0..1, clamped to PROBABILITIES; in fp32, also where autocast would have less."""
    with torch.autocast(student.device.type, enabled=False):
        p, t = student.float().clamp(*PROBABILITIES), teacher.detach().float().clamp(*PROBABILITIES)
        kl = t * (t / p).log() + (1 - t) * ((1 - t) / (1 - p)).log()
        return focal_factor(p, t, gamma) * kl


def focal_factor(p: torch.Tensor, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """((t - p)^2 + 1e-6)^(gamma / 2)."""
    return ((t - p).square() + SMOOTH) ** (gamma / 2)


def soft_label_losses(student: Outputs, teacher: Outputs, truth: GroundTruth, anchors: Anchors,
                      least_iou: float) -> dict[str, torch.Tensor]:
    """The unweighted losses towards the teacher on a batch, {name: scalar}. u_a is the largest IoU of the TEACHER'S
    box at anchor a with an object of its image, D the anchors with u_a > least_iou, U = sum_{a in D} u_a.

        kd_cls  sum_a sum_c focal_kl(class c) / U        over all anchors of the images
        kd_iou  sum_{a in D} focal_kl(IoU) / U           if both heads predict it
        kd_box  sum_{a in D} u_a (1 - GIoU(box, teacher's box)) / U

    U is the mean over the processes, and at least 1. Where it is 0, in batches without objects, so are the losses: a
    sum over all anchors with nothing to divide it by would outweigh every other step."""
    valid = valid_anchors(anchors, truth.image_sizes)
    with torch.no_grad():
        overlaps = overlaps_with_objects(teacher.boxes(anchors), truth) * valid  # (N, A)
        region = overlaps > least_iou
        image, anchor = region.nonzero(as_tuple=True)
        weights = overlaps[image, anchor]
        total = mean_over_processes(weights.sum())
        share = (total > 0) / total.clamp(min=1)
        wanted = teacher.boxes_of(anchors, image, anchor)
    losses = {"kd_cls": share * (class_divergence(student, teacher) * valid).sum(),
              "kd_box": share * (weights * (1 - giou(student.boxes_of(anchors, image, anchor), wanted))).sum()}
    if student.iou_logits is not None and teacher.iou_logits is not None:
        divergence = focal_kl(student.iou_logits[image, anchor], teacher.iou_logits[image, anchor])
        losses["kd_iou"] = share * divergence.sum()
    return losses


def class_divergence(student: Outputs, teacher: Outputs) -> torch.Tensor:
    """(N, A) focal_kl of the class scores, summed over the classes."""
    if student.probabilities is None and teacher.probabilities is None:
        return focal_kl(student.logits, teacher.logits).sum(dim=-1)
    return focal_kl_of_probabilities(student.class_scores, teacher.class_scores).sum(dim=-1)


def overlaps_with_objects(boxes: torch.Tensor, truth: GroundTruth) -> torch.Tensor:
    """(N, A) largest IoU of each box (N, A, 4) with an object of its image, 0 without any."""
    found = boxes.new_zeros(boxes.shape[:2])
    for some, images in in_chunks(boxes.shape[1], truth.boxes, truth.image_of):
        largest_by_image(found, iou(boxes[images], some[:, None]), images)
    return found
