"""Hierarchical teacher-wise distillation: the frozen teachers, which of them each image goes to, and the losses.

Every loss is returned by name and by image, (B,) each; the loss of a step is the sum of their means over the batch (all
weights are 1), and self-calibrated sampling needs them by class."""

import torch
import torch.nn.functional as F
from torch import nn


def freeze(network, batch_norm="eval", precision="fp32"):
    """Make `network` a teacher, in place: no gradients, running statistics as they were trained.

    batch_norm: `eval`, or `train` for the authors' behaviour: statistics of each batch, running ones drifting on.
    precision: that of training; `bf16` rounds the convolutions once and for all, as autocast would at every step."""
    if precision == "bf16":
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(torch.bfloat16)
    return network.requires_grad_(False).train(batch_norm == "train")


def feature_mse(features, teacher_features):
    """MSE(f_t(x), f(x)) of each image: (B, C, H, W) twice -> (B,) fp32. Its mean is the mean over all elements."""
    return F.mse_loss(features.float(), teacher_features.float(), reduction="none").mean(dim=(1, 2, 3))


def imitate_each(teachers, images, groups, features):
    """Stages 2 and 3: MSE(f_T(x), f(x)) for every teacher T, each on the whole batch.

    teachers: {name: ResNet50}. images: (B, 1, H, W). features: (B, 1024, H/16, W/16). `groups` plays no part."""
    with torch.no_grad():
        targets = {name: teacher.layer3_features(images) for name, teacher in teachers.items()}
    return {f"mse_{name}": feature_mse(features, target) for name, target in targets.items()}


def imitate_own(teachers, images, groups, features):
    """Stage 4: MSE(f_t(y)(x), f(x)), t(y) being the teacher whose subset holds class y; each image goes through its own
    teacher only (with batch norm in train mode: every image, for the statistics; the result is that of its own).

    teachers: {"t1": .., "t2": .., "t3": ..}, of head, middle and tail. groups: (B,) CPU tensor, 0 head, 1 middle,
    2 tail."""
    with torch.no_grad():
        targets = torch.empty_like(features)
        for number, name in enumerate(("t1", "t2", "t3")):
            # The indices are found on the CPU, where the labels come from: on a GPU they would cost a wait each.
            chosen = (groups == number).nonzero().squeeze(1).to(images.device, non_blocking=True)
            if not len(chosen):
                continue
            if teachers[name].training:  # the authors' batch statistics are those of the whole batch
                targets[chosen] = teachers[name].layer3_features(images)[chosen].to(targets.dtype)
            else:
                targets[chosen] = teachers[name].layer3_features(images[chosen]).to(targets.dtype)
    return {"mse_own": feature_mse(features, targets)}


def sums_by_class(losses, labels, num_classes):
    """(2, num_classes) fp32: the sums of (B,) losses by class, and how many images of each class there are."""
    sums = torch.zeros(2, num_classes, device=losses.device)
    return sums.index_add_(1, labels, torch.stack([losses.detach().float(), torch.ones_like(losses)]))
