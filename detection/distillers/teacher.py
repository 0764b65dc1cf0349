"""The frozen teacher of a detector, and what it asks of its student."""

import torch

from common.runtime import UserError, autocast, say
from common.weights import fold_batch_norm
from detection.checkpoint import load_detector
from detection.distillers.ld import check_pair, imitation_losses, ld_losses


def load_teacher(settings, description, device, precision):
    """The teacher of a run: frozen, in eval mode, its batch norms part of its convolutions, on the device.

    description: the student's. Raises UserError for a teacher that no such student can learn from."""
    try:
        teacher, theirs = load_detector(settings.teacher)
        check_pair(description, theirs, settings.imitation != "none")
    except UserError as error:
        raise UserError(f"--teacher {settings.teacher}: {error}") from None
    say(f"teacher: {settings.teacher}, {theirs['stage']} at epoch {theirs['epoch']}, ResNet-{theirs['model']['depth']}")
    teacher = fold_batch_norm(teacher).requires_grad_(False).to(device, memory_format=torch.channels_last)
    if precision == "bf16":  # as autocast would at every step; of weights that are not trained it keeps no copy
        for module in teacher.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(torch.bfloat16)
    return teacher


def distil(run, images, student, targets, anchors):
    """The losses towards the teacher on a batch, {name: scalar}. The teacher sees the very images of its student, once.

    images: (N, 3, H, W), normalised. student: its Outputs. targets, anchors: Targets and Anchors of the batch."""
    settings = run.settings
    with torch.no_grad(), autocast(run.device, run.precision):
        teacher = run.teacher(images)
    losses = ld_losses(
        student, teacher, targets, anchors, lambda_ld_main=settings.lambda_ld_main,
        lambda_ld_vlr=settings.lambda_ld_vlr, lambda_kd_main=settings.lambda_kd_main,
        lambda_kd_vlr=settings.lambda_kd_vlr, ld_temperature=settings.ld_temperature,
        kd_temperature=settings.kd_temperature, ld_norm=settings.ld_norm, gamma=settings.gamma,
        vlr_metric=settings.vlr_metric)
    if settings.imitation != "none":
        losses |= imitation_losses(settings.imitation, student, teacher, targets, anchors, settings.lambda_imitation)
    return losses
