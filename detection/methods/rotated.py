"""Rotated RetinaNet: a detector of oriented boxes that learns from annotations alone (RetinaNet: Lin et al., ICCV 2017;
with distributions of the box: Zheng et al., arXiv:2204.05957)."""

from dataclasses import dataclass
from typing import Any

import torch

from common.flags import setting
from detection.assigners.max_iou import max_iou
from detection.assigners.targets import Targets, targets_of_matches
from detection.geometry.anchors import valid_anchors
from detection.geometry.oriented import circumscribed
from detection.losses.rotated import BOX_LOSSES, BOX_NORMS, rotated_losses
from detection.methods.method import Method, Step
from detection.network.detector import Architecture
from detection.settings import SCHEDULES, Settings, settings_of_recipes

BOX_WEIGHTS = {"gwd": 5.0, "kld": 1.0, "smooth_l1": 1.0}
POSITIVE, NEGATIVE = 0.5, 0.4  # IoU from which an anchor is positive; below which it is background


@dataclass(frozen=True)
class RotatedSettings(Settings):
    """The settings of a detector of oriented boxes."""

    recipe: str = setting("", "a published schedule, in place of the script's values for "
                              + settings_of_recipes(SCHEDULES), choices=tuple(SCHEDULES))
    reg_max: int = setting(8, "bins of the distribution of each of a box's five deltas, less 1; 0 for a head that "
                              "predicts the deltas themselves")
    box_loss: str = setting("gwd", "loss of the boxes: gwd or kld between their Gaussians, or smooth_l1 of the deltas",
                            choices=BOX_LOSSES)
    box_norm: str = setting("positives", "what the box loss is a mean over: the positive anchors, or level_mean, those "
                                         "of each level, as the released code has it for kld", choices=BOX_NORMS)

    @classmethod
    def recipes(cls) -> dict[str, dict[str, Any]]:
        return SCHEDULES

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        return (*super().ranges(), ("reg_max", 0, 64))


def architecture(settings: RotatedSettings) -> Architecture:
    """The detector that the settings describe."""
    return Architecture.of(settings, "rotated")


def assign(step: Step) -> Targets:
    """The Targets of a batch by the IoU of the anchors with the horizontal boxes around the objects."""
    truth = step.truth
    valid = valid_anchors(step.anchors, truth.image_sizes)
    matched = max_iou(step.anchors.boxes, circumscribed(truth.boxes), truth.image_of, valid, POSITIVE, NEGATIVE)
    return targets_of_matches(matched, valid, torch.full_like(truth.boxes[:, 0], POSITIVE), truth)


def losses(step: Step, settings: RotatedSettings) -> dict[str, torch.Tensor]:
    """The loss of the classes and that of the boxes."""
    return rotated_losses(step.outputs, step.targets, step.anchors, settings.box_loss, settings.box_norm)


def weights(settings: RotatedSettings, num_classes: int) -> dict[str, float]:
    """{name: weight} of both."""
    return {"cls": 1.0, "box": BOX_WEIGHTS[settings.box_loss]}


ROTATED = Method(name="rotated", architecture=architecture, assign=assign, losses=losses, weights=weights)
