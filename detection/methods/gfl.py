"""GFL: a detector that learns from annotations alone (Generalized Focal Loss, Li et al., NeurIPS 2020)."""

import torch

from detection.assigners.atss import assign_by_atss
from detection.assigners.targets import Targets
from detection.losses.gfl import gfl_losses
from detection.methods.method import Method, Step
from detection.network.detector import Architecture
from detection.settings import Settings

WEIGHTS = {"qfl": 1.0, "box": 2.0, "dfl": 0.25}


def architecture(settings: Settings) -> Architecture:
    """The detector that the settings describe."""
    return Architecture(settings.depth, settings.channels, settings.tower_convs, settings.reg_max, settings.quality)


def assign(step: Step) -> Targets:
    """The Targets of a batch by ATSS, which needs the anchors alone."""
    return assign_by_atss(step.anchors, step.truth)


def losses(step: Step, settings: Settings) -> dict[str, torch.Tensor]:
    """The three terms of GFL."""
    return gfl_losses(step.outputs, step.targets, step.anchors, settings.box_loss)


GFL = Method(name="gfl", architecture=architecture, assign=assign, losses=losses,
             weights=lambda settings, num_classes: WEIGHTS)
