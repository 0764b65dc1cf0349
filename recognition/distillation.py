"""Hierarchical teacher-wise distillation: the frozen teachers, the teacher of each image, and the losses.

Every loss is returned by name and by image, (B,) each; the loss of a step is the sum of their means over the batch (all
weights are 1), and self-calibrated sampling needs the losses by class."""

from collections.abc import Iterable

import torch
from torch import nn

from common.weights import cast_convolutions, fold_batch_norm
from resnet50 import ResNet50

Teachers = dict[str, nn.Module]


def freeze(network: ResNet50, batch_norm: str = "train", precision: str = "fp32") -> nn.Module:
    """`network` as a teacher: up to layer3 (the later features are not imitated), without gradients.

    batch_norm: `train` and `own` normalise by the statistics of the images in a forward pass, and have no running
    statistics; `eval` and `recalibrated` normalise by the running statistics of `network`, folded into the
    convolutions. precision: of training; `bf16` rounds the convolutions once, as autocast would at every step."""
    network.layer4, network.fc = nn.Identity(), nn.Identity()
    if batch_norm in ("train", "own"):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
    else:
        network = fold_batch_norm(network)
    if precision == "bf16":
        cast_convolutions(network, torch.bfloat16)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def recalibrate(network: ResNet50, batches: Iterable[torch.Tensor]) -> None:
    """Recompute the running statistics of every batch norm, in place, as the plain mean over `batches`.

    network: a ResNet50. batches: an iterable of (B, 1, H, W) float images on its device."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the cumulative mean
    network.train()
    for images in batches:
        network.layer3_features(images)
    network.eval()


# ---- the features to imitate -----------------------------------------------------------------------------------------


@torch.no_grad()
def each_teacher(teachers: Teachers, images: torch.Tensor, groups: torch.Tensor,
                 whole_batch: bool = True) -> dict[str, torch.Tensor]:
    """Stages 2 and 3: f_T(x) of every teacher T, each on the whole batch. Returns {name: (B, 1024, H/16, W/16)}.

    teachers: {name: ResNet50}. images: (B, 1, H, W). groups, whole_batch: unused; parameters as in `own_teacher`."""
    return {name: teacher.layer3_features(images) for name, teacher in teachers.items()}


@torch.no_grad()
def own_teacher(teachers: Teachers, images: torch.Tensor, groups: torch.Tensor,
                whole_batch: bool = True) -> dict[str, torch.Tensor]:
    """Stage 4: f_t(y)(x), where t(y) is the teacher whose subset holds class y. Returns
    {"own": (B, 1024, H/16, W/16)}.

    teachers: {"t1": .., "t2": .., "t3": ..}, of head, middle and tail. groups: (B,) CPU tensor, 0 head, 1 middle,
    2 tail. whole_batch: whether a teacher computes the whole batch, for the statistics of its batch norm, or its own
    images only."""
    targets = None
    teacher_of_group = [teachers[name] for name in ("t1", "t2", "t3")]
    for teacher in dict.fromkeys(teacher_of_group):  # one network may be the teacher of several groups
        taught = torch.tensor([other is teacher for other in teacher_of_group])
        # On the CPU, where the labels are: on a GPU the number of indices would be waited for.
        chosen = taught[groups].nonzero().squeeze(1).to(images.device, non_blocking=True)
        if not len(chosen):
            continue
        features = teacher.layer3_features(images)[chosen] if whole_batch else teacher.layer3_features(images[chosen])
        if targets is None:
            targets = features.new_empty(len(images), *features.shape[1:]).to(memory_format=torch.channels_last)
        targets[chosen] = features
    return {"own": targets}


# ---- losses ----------------------------------------------------------------------------------------------------------


def feature_mse(features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """MSE(f_t(x), f(x)) of each image: (B, C, H, W) twice -> (B,) fp32. Its mean is the mean over all elements."""
    difference = features.float() - teacher_features
    # As ||d||^2 / n: F.mse_loss with a mean by image gives gradients in NCHW, which slow down the backward pass through
    # layer1 to layer3 of a network in NHWC; and it takes twice as long itself.
    return torch.linalg.vector_norm(difference, dim=(1, 2, 3)).square() / difference[0].numel()


def imitate(features: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{"mse_" + name: (B,)}: the MSE of the student's features (B, C, H, W) to each of `targets`."""
    return {f"mse_{name}": feature_mse(features, target) for name, target in targets.items()}


def sums_by_class(losses: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(2, num_classes) fp32: the sums of (B,) losses by class, and the numbers of images of the classes."""
    sums = torch.zeros(2, num_classes, device=losses.device)
    return sums.index_add_(1, labels, torch.stack([losses.detach().float(), torch.ones_like(losses)]))
