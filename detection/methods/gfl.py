"""GFL: a detector that learns from annotations alone (Generalized Focal Loss, Li et al., NeurIPS 2020)."""

from dataclasses import dataclass

import torch

from common.flags import setting
from detection.assigners.atss import assign_by_atss
from detection.assigners.targets import Targets
from detection.losses.gfl import BOX_LOSSES, gfl_losses
from detection.methods.method import Method, Step
from detection.network.detector import Architecture
from detection.settings import Settings

WEIGHTS = {"qfl": 1.0, "box": 2.0, "dfl": 0.25}


@dataclass(frozen=True)
class GFLSettings(Settings):
    """The settings of a GFL detector."""

    reg_max: int = setting(16, "the largest distance from an anchor to a side of its box, in strides")
    quality: bool = setting(False, "GFocal V2: the head also estimates the quality of its boxes")
    box_loss: str = setting("giou", "loss of the boxes; of VOC's published ResNet-18 ciou", choices=tuple(BOX_LOSSES))

    def ranges(self) -> tuple[tuple[str, float, float], ...]:
        return (*super().ranges(), ("reg_max", 4, 64))


def architecture(settings: GFLSettings) -> Architecture:
    """The detector that the settings describe."""
    return Architecture.of(settings, "gfl")


def assign(step: Step) -> Targets:
    """The Targets of a batch by ATSS, which needs the anchors alone."""
    return assign_by_atss(step.anchors, step.truth)


def losses(step: Step, settings: GFLSettings) -> dict[str, torch.Tensor]:
    """The three terms of GFL."""
    return gfl_losses(step.outputs, step.targets, step.anchors, settings.box_loss)


GFL = Method(name="gfl", architecture=architecture, assign=assign, losses=losses,
             weights=lambda settings, num_classes: WEIGHTS)
