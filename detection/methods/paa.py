"""PAA: a detector whose own losses decide which anchors are positive (Probabilistic Anchor Assignment, Kim and Lee,
ECCV 2020)."""

from dataclasses import dataclass
from typing import Any

import torch

from common.flags import setting
from detection.assigners.paa import assign_by_paa
from detection.assigners.targets import Targets
from detection.losses.paa import BOX_WEIGHT, paa_losses
from detection.methods.method import Method, Step
from detection.network.detector import Architecture
from detection.network.paa_head import AUXILIARIES, COP_PADDINGS
from detection.settings import SCHEDULES, Settings

WEIGHTS = {"cls": 1.0, "box": BOX_WEIGHT, "iou": 0.5}
RECIPES = {"1x": {**SCHEDULES["1x"], "short": (800, 800)}, "2x": {**SCHEDULES["2x"], "short": (640, 800)}}


@dataclass(frozen=True)
class PAASettings(Settings):
    """The settings of a PAA detector."""

    recipe: str = setting("", "a published schedule, in place of the script's values for epochs, lr_steps, short",
                          choices=tuple(RECIPES))
    auxiliary: str = setting("iou", "what the head predicts besides classes and boxes: the IoU, and implicit (iop) or "
                                    "conditional (cop) objectness", choices=AUXILIARIES)
    cop_padding: str = setting("prob0", "the class score of what lies outside the map, for conditional objectness: 0 "
                                        "(prob0, paper), or that of a logit of 0 (logit0, released code)",
                               choices=tuple(COP_PADDINGS))
    lone_candidate: bool = setting(False, "an object with a single candidate has it as its positive, as in the "
                                          "original PAA; else it has none, as in the released code of LAD")

    @classmethod
    def recipes(cls) -> dict[str, dict[str, Any]]:
        return RECIPES


def architecture(settings: PAASettings) -> Architecture:
    """The detector that the settings describe."""
    return Architecture.of(settings, "paa")


def losses(step: Step, settings: PAASettings) -> dict[str, torch.Tensor]:
    """The three terms of PAA. Boxes are weighted by their IoU where the head predicts that."""
    return paa_losses(step.outputs, step.targets, step.anchors, weighted=step.outputs.iou_logits is not None)


def assign(step: Step) -> Targets:
    """The Targets of a batch by the network's own costs."""
    return assign_by_paa(step.outputs, step.anchors, step.truth, step.settings.lone_candidate)


PAA = Method(name="paa", architecture=architecture, assign=assign, assigns_by_outputs=True, losses=losses,
             weights=lambda settings, num_classes: WEIGHTS)
